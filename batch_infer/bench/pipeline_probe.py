"""Probe pipelines without a model family by recording the network calls of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from batch_infer.bench.probe import FullBatch, to_pixels
from batch_infer.errors import RowError, first_line
from batch_infer.models import count_flops
from batch_infer.records import PromptRequest
from batch_infer.stacking import ROW_ERRORS, Network, copy_pipeline, count_elements, list_shapes

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline

Forward = Callable[..., Any]


class PipelineProbe:
    """Probes a model whose rows run their pipeline's own call.

    To count costs, the pipeline is called for a row, but each network runs only once for each shape of its arguments,
    and its result is used again.
    """

    def __init__(self, model: AnyPipeline) -> None:
        self._model = model
        self.pipeline = copy_pipeline(model.pipeline, host_timesteps=False)
        denoisers = [network for network in model.plan.networks if network.kind == "denoise"]
        self.denoiser: torch.nn.Module = denoisers[0].module
        self.scheduler_name = type(getattr(model.pipeline, "scheduler", None)).__name__
        self.can_group = any(network.name in model.plan.axes for network in denoisers)
        self._results: dict[object, Any] = {}
        self._flops: dict[object, int] = {}
        self._evaluations: dict[tuple[float, ...], int] = {}

    def count_evaluations(self, request: PromptRequest) -> int:
        params = request.params
        key = params.num_inference_steps, params.guidance_scale, params.guidance_rescale
        if key not in self._evaluations:
            self._evaluations[key] = sum(elements for kind, elements, _ in self._record(request) if kind == "denoise")
        return self._evaluations[key]

    def count_flops(self, request: PromptRequest) -> tuple[int, int]:
        """Return the FLOP of the first denoiser call per batch element, and of all decoder calls."""
        calls = self._record(request)
        elements, flops = next((elements, flops) for kind, elements, flops in calls if kind == "denoise")
        return flops // elements, sum(flops for kind, _, flops in calls if kind == "decode")

    @torch.no_grad()
    def fill_batch(self, request: PromptRequest, slots: int) -> FullBatch:
        """Return the denoiser call that batch-infer stacks for as many such rows as fit into the slots."""
        captured: list[tuple[Forward, Mapping[str, Any]]] = []

        def capture(original: Forward, arguments: dict[str, Any]) -> Any:
            captured[:] = [(original, arguments)]
            return original(**arguments)

        with ExitStack() as replacements:
            for network in self._model.plan.networks:
                if network.kind == "denoise":
                    replacements.enter_context(network.replaced(capture))
            stacker = self._model.make_stacker(slots, 1, lambda kind: nullcontext())
            try:
                started = None
                while started is None or (stacker.free_slots >= started and not self._model.plan.is_alone):
                    stacker.start([(None, self._model.make_arguments(request))])
                    _raise_errors(stacker.take_ended())
                    stacker.admit()
                    started = started or max(1, slots - stacker.free_slots)
                stacker.evaluate()
                elements = stacker.last_used
            finally:
                stacker.close()
        forward, arguments = captured[0]
        return FullBatch(elements, torch.no_grad()(partial(forward, **arguments)))

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

    def _record(self, request: PromptRequest) -> list[tuple[str, int, int]]:
        """Call the pipeline for a row, and return the kind, batch elements and FLOP of each network call."""
        calls: list[tuple[str, int, int]] = []
        pipeline = copy_pipeline(self._model.pipeline, host_timesteps=False)
        try:
            with self._replayed(calls), torch.no_grad():
                pipeline(**self._model.make_arguments(request))
        except ROW_ERRORS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise RowError(f"{type(pipeline).__name__} does not support the row: {first_line(error)}") from error
        return calls

    @contextmanager
    def _replayed(self, calls: list[tuple[str, int, int]]) -> Iterator[None]:
        def replay(network: Network, original: Forward, arguments: dict[str, Any]) -> Any:
            key = network.name, list_shapes(arguments)
            if key not in self._results:
                self._flops[key] = count_flops(lambda: self._results.update({key: original(**arguments)}))
            elements = count_elements(self._model.plan.axes.get(network.name), arguments)
            calls.append((network.kind, elements, self._flops[key]))
            return self._results[key]

        with ExitStack() as replacements:
            for network in self._model.plan.networks:
                replacements.enter_context(network.replaced(partial(replay, network)))
            yield


def _raise_errors(ended: Sequence[Any]) -> None:
    """Raise RowError if a row has failed before its first denoiser call."""
    for row in ended:
        raise RowError(f"the model does not support the row: {first_line(row.error)}")
