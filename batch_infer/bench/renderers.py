"""What renders the rows: batch-infer's chain, or the diffusers pipeline as one would call it by hand."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.bench.workload import size_name, size_of
from batch_infer.chain import StepLevelChain, UnrenderedRow
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
    """The chain of a run, with rows in the order of a run."""

    def __init__(self, model: LatentDiffusion, compute: Compute) -> None:
        self.chain = cast(StepLevelChain, make_chain(model, compute))

    def capacity(self, row: PromptRequest) -> int:
        """Return how many rows like this one are computed together."""
        return self.chain.batch_sizes.for_size(size_of(row))[0] // row.params.slots

    def render(self, rows: Sequence[PromptRequest]) -> Iterator[RowImage]:
        """Yield each image once its pixels are on the host. Raises ModelError for a row that gives no image."""
        self.chain.stages_by_size.clear()
        for outcome in self.chain.render(order_requests(rows, lambda size: self.chain.batch_sizes.for_size(size)[0])):
            if isinstance(outcome, UnrenderedRow):
                raise ModelError(f"a row of {outcome.request.params} gave no image: {outcome.error}")
            yield outcome.request, outcome.pixels

    def details(self) -> Mapping[str, Any]:
        """Return further figures of the last rendering, as --json prints them."""
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
    """The diffusers pipeline around the same networks, with one generator per row and, like ours, no safety checker.

    By default it calls the networks uncompiled. Their other optimisations for a GPU (channels last, fused projections)
    speed it up too. With `compiled` it calls the networks that torch.compile made, in batches that are padded to one
    size so that each is compiled once.
    """

    def __init__(self, model: LatentDiffusion, compute: Compute, *, grouped: bool, compiled: bool = False) -> None:
        self._model, self._compute = model, compute
        self._grouped, self._compiled = grouped, compiled
        self._pipeline = _build_pipeline(model)
        self.decodes_singly = False
        """Whether images are decoded one by one, because memory is too small for a batch of them."""

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
        """Yield rows with equal parameters together, as many as fit into the slots, or else single rows."""
        if not self._grouped:
            yield from ([row] for row in rows)
            return
        for _, group in groupby(sorted(rows, key=_group_key), _group_key):
            equal = list(group)
            limit = self.capacity(equal[0])
            yield from (equal[first : first + limit] for first in range(0, len(equal), limit))

    def _call(self, batch: list[PromptRequest]) -> np.ndarray:
        try:
            with out_of_memory_errors():
                return self._render(batch)
        except torch.OutOfMemoryError:
            if self.decodes_singly:
                raise
        # Not in the except block, because the traceback would keep tensors alive.
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
    own = model.pipeline
    parts = dict(own.components)
    parts |= {"scheduler": copy.deepcopy(own.scheduler), "safety_checker": None, "feature_extractor": None}
    if "unet" in parts and parts["unet"] is None:
        parts["unet"] = UNetAdapter(model.networks[0])
    names = inspect.signature(type(own)).parameters
    values = {"requires_safety_checker": False, **{name: own.config[name] for name in own.config}, **parts}
    pipeline = type(own)(**{name: value for name, value in values.items() if name in names})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class UNetAdapter(torch.nn.Module):
    """A UNet that diffusers does not have, with the attributes that its pipeline reads."""

    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet
        own: Any = unet.config
        self.config = SimpleNamespace(in_channels=own.in_channels, sample_size=own.sample_size, time_cond_proj_dim=None)
        weight = next(unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object
    ) -> Any:
        return self.unet(sample, timestep.expand(len(sample)), encoder_hidden_states)


@contextmanager
def _without_compilation(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Use the networks' own forward methods, not the compiled ones that replace them."""
    replaced = [(network, network.__dict__.pop("forward")) for network in networks if "forward" in vars(network)]
    try:
        yield
    finally:
        for network, forward in replaced:
            network.forward = forward


@contextmanager
def _decoding_singly(vae: Any) -> Iterator[None]:
    """Decode one image per call. The setting is restored, because the decoder is shared."""
    before, vae.use_slicing = vae.use_slicing, True
    try:
        yield
    finally:
        vae.use_slicing = before
