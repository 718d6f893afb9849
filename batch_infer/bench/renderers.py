"""Render the rows with batch-infer's chain, or with the diffusers pipeline as a script would call it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.bench.workload import size_name, size_of
from batch_infer.chain import UnrenderedRow
from batch_infer.errors import ModelError
from batch_infer.planning import order_requests
from batch_infer.records import PromptRequest
from batch_infer.settings import Compute
from batch_infer.worker import make_chain

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion

RowImage = tuple[PromptRequest, np.ndarray]
"""A row and its pixels (H, W, 3) uint8 on the host."""


class BatchInfer:
    """Renders with the chain and row order of a run."""

    def __init__(self, model: LatentDiffusion, compute: Compute) -> None:
        self.chain = make_chain(model, compute)

    def capacity(self, row: PromptRequest) -> int:
        """Return the number of rows with this row's size and guidance that fit into a batch."""
        return self.chain.batch_sizes.for_size(size_of(row))[0] // row.params.slots

    def render(self, rows: Sequence[PromptRequest]) -> Iterator[RowImage]:
        """Yield each image once its pixels are on the host. Raises ModelError if a row has no image."""
        self.chain.stages_by_size.clear()
        for outcome in self.chain.render(order_requests(rows, lambda size: self.chain.batch_sizes.for_size(size)[0])):
            if isinstance(outcome, UnrenderedRow):
                raise ModelError(f"a row of {outcome.request.params} has no image: {outcome.error}")
            yield outcome.request, outcome.pixels

    def details(self) -> Mapping[str, Any]:
        """Return more figures of the last rendering, as --json prints them."""
        stages = self.chain.stages
        shapes = {size_name(size): self.chain.batch_sizes.for_size(size) for size in self.chain.stages_by_size}
        return {
            "ticks": stages.ticks,
            "row_forwards": stages.row_forwards,
            "slot_ticks": stages.slot_ticks,
            "occupancy": round(stages.occupancy, 4),
            "stage_shares": stages.shares,
            "slots": {name: slots for name, (slots, _) in shapes.items()},
            "decode_batch": {name: decode for name, (_, decode) in shapes.items()},
        }


class PlainDiffusers:
    """Renders with the diffusers pipeline on the same networks, with one generator per row and no safety checker.

    By default, it calls the networks uncompiled, but with their other GPU optimisations (channels last, fused
    projections). With `compiled`, it calls the compiled networks, and pads batches so that torch.compile does not
    compile for every number of rows.
    """

    def __init__(self, model: LatentDiffusion, compute: Compute, *, grouped: bool, compiled: bool = False) -> None:
        self._model, self._compute = model, compute
        self._grouped, self._compiled = grouped, compiled
        self._pipeline = _build_pipeline(model)
        self.decodes_singly = False
        """Whether images are decoded one by one because a batch ran out of memory."""

    def capacity(self, row: PromptRequest) -> int:
        return self._compute.shape_of(*size_of(row)).slots // row.params.slots if self._grouped else 1

    def render(self, rows: Sequence[PromptRequest]) -> Iterator[RowImage]:
        with nullcontext() if self._compiled else _without_compilation(self._model.networks):
            for batch in self._batches(rows):
                padding = [batch[-1]] * (self.capacity(batch[0]) - len(batch)) if self._compiled else []
                yield from zip(batch, self._call(batch + padding), strict=False)

    def details(self) -> Mapping[str, Any]:
        return {"vae_slicing": self.decodes_singly}

    def _batches(self, rows: Sequence[PromptRequest]) -> Iterator[list[PromptRequest]]:
        """Yield batches of rows with equal parameters that fit into the slots, or single rows if not grouped."""
        if not self._grouped:
            yield from ([row] for row in rows)
            return
        for _, group in groupby(sorted(rows, key=_group_key), _group_key):
            group_rows = list(group)
            limit = self.capacity(group_rows[0])
            yield from (group_rows[start : start + limit] for start in range(0, len(group_rows), limit))

    def _call(self, batch: list[PromptRequest]) -> np.ndarray:
        try:
            with out_of_memory_errors():
                return self._render(batch)
        except torch.OutOfMemoryError:
            if self.decodes_singly:
                raise
        # Retry outside the except block, where the traceback would keep tensors alive.
        self.decodes_singly = True
        return self._render(batch)

    def _render(self, batch: list[PromptRequest]) -> np.ndarray:
        params = batch[0].params
        optional = {"guidance_rescale": params.guidance_rescale} if params.guidance_rescale else {}
        with _decoding_singly(self._pipeline.vae) if self.decodes_singly else nullcontext():
            images = self._pipeline(
                [row.prompt for row in batch],
                height=params.height,
                width=params.width,
                num_inference_steps=params.num_inference_steps,
                guidance_scale=params.guidance_scale,
                generator=[self._generator(row) for row in batch],
                output_type="pt",
                **optional,
            ).images
        pixels: np.ndarray = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return pixels

    @staticmethod
    def _generator(row: PromptRequest) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(row.seed)


Renderer: TypeAlias = BatchInfer | PlainDiffusers


def _group_key(row: PromptRequest) -> tuple[float, ...]:
    params = row.params
    return params.height, params.width, params.num_inference_steps, params.guidance_scale


def _build_pipeline(model: LatentDiffusion) -> Any:
    original = model.pipeline
    parts = dict(original.components)
    parts |= {"scheduler": copy.deepcopy(original.scheduler), "safety_checker": None, "feature_extractor": None}
    if "unet" in parts and parts["unet"] is None:
        parts["unet"] = UNetAdapter(model.networks[0])
    names = inspect.signature(type(original)).parameters
    values = {"requires_safety_checker": False, **original.config, **parts}
    pipeline = type(original)(**{name: value for name, value in values.items() if name in names})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class UNetAdapter(torch.nn.Module):
    """Wraps a UNet of a class that diffusers lacks, and adds the attributes that the diffusers pipeline reads."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet
        config: Any = unet.config
        channels, size = config.in_channels, config.sample_size
        self.config = SimpleNamespace(in_channels=channels, sample_size=size, time_cond_proj_dim=None)
        weight = next(unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object
    ) -> Any:
        return self.unet(sample, timestep.expand(len(sample)), encoder_hidden_states)


@contextmanager
def _without_compilation(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Use the networks' original forward methods instead of the compiled ones inside the context."""
    replaced = [(network, network.__dict__.pop("forward")) for network in networks if "forward" in vars(network)]
    try:
        yield
    finally:
        for network, forward in replaced:
            network.forward = forward


@contextmanager
def _decoding_singly(vae: Any) -> Iterator[None]:
    """Decode one image per call inside the context only, because other contenders share the decoder."""
    previous, vae.use_slicing = vae.use_slicing, True
    try:
        yield
    finally:
        vae.use_slicing = previous
