"""Those that are timed: batch-infer's chain, and plain diffusers as one would drive it by hand."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.bench.figures import by_name
from batch_infer.chain import StepLevelChain, Unrendered
from batch_infer.errors import ModelError
from batch_infer.planning import order_requests
from batch_infer.records import PromptRequest
from batch_infer.settings import Compute
from batch_infer.worker import make_chain

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion

Image = tuple[PromptRequest, np.ndarray]
"""A row, and its pixels (H, W, 3) uint8 on the host."""


class Contender(Protocol):
    """Renders rows, and gives every image once its pixels are on the host."""

    def capacity(self, row: PromptRequest) -> int:
        """How many rows like this one it computes together."""
        ...

    def render(self, rows: Sequence[PromptRequest]) -> Iterable[Image]: ...

    def told(self) -> Mapping[str, Any]:
        """What there is to tell of how the last rows were rendered."""
        ...


class Ours:
    """batch-infer: the chain that a run has, over rows in the order in which a run takes them."""

    def __init__(self, model: LatentDiffusion, compute: Compute) -> None:
        self.chain: StepLevelChain = make_chain(model, compute)

    def capacity(self, row: PromptRequest) -> int:
        return _slots(self.chain, row) // row.params.slots

    def render(self, rows: Sequence[PromptRequest]) -> Iterator[Image]:
        """Raises ModelError where a row gives no image."""
        self.chain.stages_by_size.clear()
        for outcome in self.chain.render(order_requests(rows, lambda size: self.chain.shape.of(size)[0])):
            if isinstance(outcome, Unrendered):
                raise ModelError(f"a row of {outcome.request.params} gave no image: {outcome.error}")
            yield outcome.request, outcome.pixels

    def told(self) -> Mapping[str, Any]:
        stages, by_size = self.chain.stages, self.chain.stages_by_size
        shapes = {size: self.chain.shape.of(size) for size in by_size}
        return {
            "ticks": stages.ticks,
            "row_forwards": stages.row_forwards,
            "slot_ticks": stages.slot_ticks,
            "occupancy": round(stages.occupancy, 4),
            "stage_shares": stages.shares,
            "slots": by_name({size: slots for size, (slots, _) in shapes.items()}),
            "decode_batch": by_name({size: decode for size, (_, decode) in shapes.items()}),
        }


def _slots(chain: StepLevelChain, row: PromptRequest) -> int:
    return chain.shape.of((row.params.height, row.params.width))[0]


class PlainDiffusers:
    """diffusers' own pipeline around the same networks: without a safety checker, as ours, and one generator a row.

    By default it calls the networks uncompiled; what else was done to them for a GPU (channels last, fused projections)
    is to its advantage too. `compiled` lets it call what torch.compile made of them, in batches that are padded to one
    size so that this is done once.
    """

    def __init__(self, model: LatentDiffusion, compute: Compute, *, grouped: bool, compiled: bool = False) -> None:
        self._model, self._compute = model, compute
        self._grouped, self._compiled = grouped, compiled
        self._pipeline = _pipeline(model)
        self.sliced = False
        """Whether images are decoded one by one, because memory did not hold a batch of them."""

    def capacity(self, row: PromptRequest) -> int:
        if not self._grouped:
            return 1
        return self._compute.shape_of(row.params.height, row.params.width).slots // row.params.slots

    def render(self, rows: Sequence[PromptRequest]) -> Iterator[Image]:
        with _networks_as_they_are(self._model.networks, wanted=not self._compiled):
            for batch in self._batches(rows):
                padding = [batch[-1]] * (self.capacity(batch[0]) - len(batch)) if self._compiled else []
                yield from zip(batch, self._call(batch + padding), strict=False)

    def told(self) -> Mapping[str, Any]:
        return {"vae_slicing": self.sliced}

    def _batches(self, rows: Sequence[PromptRequest]) -> Iterator[list[PromptRequest]]:
        """Rows of equal parameters together, as many as fill the slots."""
        if not self._grouped:
            yield from ([row] for row in rows)
            return
        for _, group in groupby(sorted(rows, key=_alike), _alike):
            alike = list(group)
            most = self.capacity(alike[0])
            yield from (alike[first : first + most] for first in range(0, len(alike), most))

    def _call(self, batch: list[PromptRequest]) -> np.ndarray:
        try:
            with out_of_memory_errors():
                return self._render(batch)
        except torch.OutOfMemoryError:
            if self.sliced:
                raise
        # Outside of the except block, whose traceback would keep tensors alive.
        self.sliced = True
        return self._render(batch)

    def _render(self, batch: list[PromptRequest]) -> np.ndarray:
        params = batch[0].params
        rescaled = {"guidance_rescale": params.guidance_rescale} if params.guidance_rescale else {}
        with _sliced(self._pipeline.vae, wanted=self.sliced):
            images = self._pipeline(
                [row.prompt for row in batch],
                height=params.height,
                width=params.width,
                num_inference_steps=params.num_inference_steps,
                guidance_scale=params.guidance_scale,
                generator=[self._generator(row) for row in batch],
                output_type="pt",
                **rescaled,
            ).images
        pixels: np.ndarray = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return pixels

    @staticmethod
    def _generator(row: PromptRequest) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(row.seed)


def _alike(row: PromptRequest) -> tuple[float, ...]:
    params = row.params
    return params.height, params.width, params.num_inference_steps, params.guidance_scale


def _pipeline(model: LatentDiffusion) -> Any:
    own = model.pipeline
    parts = dict(own.components)
    parts |= {"scheduler": copy.deepcopy(own.scheduler), "safety_checker": None, "feature_extractor": None}
    if "unet" in parts and parts["unet"] is None:
        parts["unet"] = _AsDiffusers(model.networks[0])
    taken = inspect.signature(type(own)).parameters
    settings = {"requires_safety_checker": False, **{name: own.config[name] for name in own.config if name in taken}}
    pipeline = type(own)(**{name: value for name, value in {**settings, **parts}.items() if name in taken})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _AsDiffusers(torch.nn.Module):
    """A UNet that diffusers has not, with what its pipeline asks of one."""

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
def _networks_as_they_are(networks: Iterable[torch.nn.Module], *, wanted: bool) -> Iterator[None]:
    """Without what was put in place of their forward to make them faster."""
    held = [(network, network.__dict__.pop("forward")) for network in networks if wanted and "forward" in vars(network)]
    try:
        yield
    finally:
        for network, forward in held:
            network.forward = forward


@contextmanager
def _sliced(vae: Any, *, wanted: bool) -> Iterator[None]:
    """One image a decoder call. The decoder is shared, so that it is set back."""
    before = vae.use_slicing
    vae.use_slicing = wanted
    try:
        yield
    finally:
        vae.use_slicing = before
