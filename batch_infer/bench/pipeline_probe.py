"""Probe pipelines without a model family, whose rows run their pipeline's own call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from batch_infer.bench.probe import FullBatch, to_pixels
from batch_infer.models import count_flops
from batch_infer.records import PromptRequest
from batch_infer.stacking import Network, copy_pipeline, record_pipeline

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline


class PipelineProbe:
    """Probes a pipeline by making its denoiser's calls, and by counting those of a row."""

    def __init__(self, model: AnyPipeline) -> None:
        self._model = model
        self.pipeline = copy_pipeline(model.pipeline, model.plan.device, host_timesteps=False)
        denoisers = [network for network in model.plan.networks if network.kind == "denoise"]
        self.denoiser: torch.nn.Module = denoisers[0].module
        self.scheduler_name = type(getattr(model.pipeline, "scheduler", None)).__name__
        self.can_group = any(network.name in model.plan.axes for network in denoisers)

    def count_evaluations(self, request: PromptRequest) -> int:
        cost = self._model.count_cost(request.params, request.negative_prompt)
        return cost.evaluations * cost.slots

    @torch.no_grad()
    def count_flops(self, request: PromptRequest) -> tuple[int, int]:
        """Return the FLOP of the first denoiser call per batch element, and of all decoder calls.

        The pipeline is called for the row, but the networks reuse the results of their first calls.
        """
        plan, flops = self._model.plan, dict[str, list[int]](denoise=[], decode=[])

        def count(network: Network, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
            results: list[Any] = []
            flops[network.kind].append(count_flops(lambda: results.append(original(**arguments))))
            return results[0]

        with ExitStack() as replacements:
            for network in plan.networks:
                if network.kind in flops:
                    replacements.enter_context(network.replaced(partial(count, network)))
            pipeline = copy_pipeline(self._model.pipeline, self._model.plan.device, host_timesteps=False)
            calls = record_pipeline(pipeline, plan.networks, self._model.make_arguments(request), {})
        first = next(call for call in calls if call.network.kind == "denoise")
        return flops["denoise"][0] // plan.count_elements(first.network, first.arguments), sum(flops["decode"])

    def fill_batch(self, request: PromptRequest, slots: int) -> FullBatch:
        """Return the denoiser call that batch-infer makes for as many such rows as fit into the slots."""
        params = request.params
        rows = self._model.count_rows(slots, params)
        elements = rows * self._model.count_cost(params, request.negative_prompt).slots
        return FullBatch(elements, self._model.make_call(slots, params))

    @torch.no_grad()
    def call_pipeline(self, requests: Sequence[PromptRequest]) -> np.ndarray:
        rows = [self._model.make_arguments(request) for request in requests]
        # Prompts and generators are lists with one element per row.
        merged = {
            name: [part for row in rows for part in row[name]] if isinstance(value, list) else value
            for name, value in rows[0].items()
        }
        images = self.pipeline(**merged).images
        if not isinstance(images, torch.Tensor):
            images = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)
        return to_pixels(images.float())
