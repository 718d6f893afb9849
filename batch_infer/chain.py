"""The chain: requests in, judged images out (encode, denoise, decode, check)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from batch_infer.diffusion import Finished, Slots
from batch_infer.errors import RowError
from batch_infer.records import PromptRequest, SamplingParams, Verdict
from batch_infer.safety import Judge

if TYPE_CHECKING:
    from batch_infer.models import Conditioning, Family

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """An image (H, W, 3) uint8 with what the safety check said of it."""

    request: PromptRequest
    pixels: np.ndarray
    verdict: Verdict
    conditioning: Conditioning
    slots: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Unrendered:
    """A row that gave no image: `invalid` where the row asks for what cannot be had, else `failed`."""

    request: PromptRequest
    invalid: bool
    error: str


@dataclass(slots=True)
class Stages:
    """Where the time went, in seconds of the device's thread (`seconds`: all of them), and how full the slots were."""

    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    check: float = 0.0
    seconds: float = 0.0
    images: int = 0
    row_forwards: int = 0
    slot_ticks: int = 0
    ticks: int = 0

    def __add__(self, other: Stages) -> Stages:
        return Stages(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Stages)))

    @property
    def occupancy(self) -> float:
        """Row-forwards done over row-forwards computed."""
        return self.row_forwards / self.slot_ticks if self.slot_ticks else 0.0


@dataclass(frozen=True, slots=True)
class ChainShape:
    """The fixed batch sizes of a run: row-forwards in a UNet call, images in a decoder and checker call."""

    slots: int
    decode: int

    def __post_init__(self) -> None:
        if self.slots < 2 or self.decode < 1:
            raise ValueError(f"{self}: a row with guidance takes two slots, and its image a place in a decoder call")


@dataclass(slots=True)
class _Waiting:
    """Requests on their way to the slots: read ahead, of one shape, with their prompts encoded."""

    guided: deque[tuple[PromptRequest, Conditioning]] = field(default_factory=deque)
    unguided: deque[tuple[PromptRequest, Conditioning]] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.guided) + len(self.unguided)

    def add(self, request: PromptRequest, conditioning: Conditioning) -> None:
        (self.guided if request.params.guided else self.unguided).append((request, conditioning))

    def take(self, free: int) -> tuple[PromptRequest, Conditioning] | None:
        """The longest row that fits: a single free slot goes to a row without guidance, if one waits."""
        fitting = [queue for queue, slots in ((self.guided, 2), (self.unguided, 1)) if queue and slots <= free]
        if not fitting:
            return None
        return max(fitting, key=lambda queue: queue[0][0].params.num_inference_steps).popleft()


_Tag: TypeAlias = "tuple[PromptRequest, Conditioning]"


class Chain:
    """One device's way from requests to judged images.

    The stages take turns on one thread. On a CPU that is right: the CPU is the device, and a second torch thread would
    only fight the first for its cores. On a GPU decoding and checking still wait for a stream of their own.
    What follows (compress, hash, write) is the worker's, on threads beside this one.
    """

    def __init__(self, model: Family, shape: ChainShape, judge: Judge | None, stop: Callable[[], bool] = lambda: False):
        """`stop` is asked at every tick; once it says so, rows under way are given up and `render` ends."""
        self._model, self._shape, self._judge, self._stop = model, shape, judge, stop
        self._stages = Stages()
        self.stages_by_size: dict[Shape, Stages] = {}

    @property
    def stages(self) -> Stages:
        """Those of all sizes together."""
        return sum(self.stages_by_size.values(), Stages())

    def render(self, requests: Iterable[PromptRequest]) -> Iterator[Rendered | Unrendered]:
        """Render requests as slots come free, in the order in which they finish.

        Rows next to each other should share a size: a change of size waits until the slots have emptied.
        """
        source = _Ahead(iter(requests))
        started = time.perf_counter()
        while (first := source.peek()) is not None and not self._stop():
            size = first.params.height, first.params.width
            self._stages = self.stages_by_size.setdefault(size, Stages())
            yield from self._render_size(source, size)
            self._stages.seconds += time.perf_counter() - started
            started = time.perf_counter()

    def _render_size(self, source: _Ahead, size: Shape) -> Iterator[Rendered | Unrendered]:
        model = self._model
        slots: Slots[_Tag] = Slots(model, self._shape.slots, model.latent_shape(*size), model.device, model.dtype)
        waiting, finished = _Waiting(), list[Finished[_Tag]]()
        while not self._stop():
            self._read_ahead(source, size, waiting)
            yield from self._admit(waiting, slots)
            if not slots.busy:
                if waiting or source.has(size):
                    continue
                break
            finished += self._tick(slots)
            while len(finished) >= self._shape.decode:
                yield from self._finish(finished[: self._shape.decode])
                del finished[: self._shape.decode]
        if finished:
            yield from self._finish(finished)

    def _read_ahead(self, source: _Ahead, size: Shape, waiting: _Waiting) -> None:
        """Keep as many rows waiting as there are slots; encode their prompts together, before a slot wants them."""
        if len(waiting) > self._shape.slots // 2:
            return
        batch = source.take(size, self._shape.slots - len(waiting))
        if batch:
            started = time.perf_counter()
            for request, conditioning in zip(batch, self._model.condition(batch), strict=True):
                waiting.add(request, conditioning)
            self._stages.encode += time.perf_counter() - started

    def _admit(self, waiting: _Waiting, slots: Slots[_Tag]) -> Iterator[Unrendered]:
        while (taken := waiting.take(slots.free)) is not None:
            request, conditioning = taken
            try:
                table = self._model.solver.table(request.params.num_inference_steps)
            except RowError as error:
                yield Unrendered(request, invalid=True, error=str(error))
                continue
            slots.admit(taken, request.params, request.seed, table, conditioning.context)

    @torch.inference_mode()
    def _tick(self, slots: Slots[_Tag]) -> list[Finished[_Tag]]:
        started = time.perf_counter()
        before = slots.row_forwards
        done = slots.tick()
        self._stages.ticks += 1
        self._stages.slot_ticks += slots.size
        self._stages.row_forwards += slots.row_forwards - before
        self._stages.denoise += time.perf_counter() - started
        return done

    def _finish(self, batch: list[Finished[_Tag]]) -> Iterator[Rendered | Unrendered]:
        """Decode and judge one micro-batch of finished rows, padded to the fixed size."""
        self._stages.images += len(batch)
        pixels, whole = self._decode([row.latents for row in batch])
        verdicts = self._check(pixels)
        for row, image, finite, verdict in zip(batch, pixels, whole, verdicts, strict=True):
            request, conditioning = row.tag
            if finite:
                yield Rendered(request, image, verdict, conditioning, self._shape.slots, row.seconds)
            else:
                yield Unrendered(request, invalid=False, error=_not_finite(request.params, self._model.dtype))

    @torch.inference_mode()
    def _decode(self, latents: list[torch.Tensor]) -> tuple[list[np.ndarray], list[bool]]:
        started = time.perf_counter()
        padded = torch.stack(latents + [latents[-1]] * (self._shape.decode - len(latents)))
        images = self._model.decode(padded)[: len(latents)]
        finite = torch.isfinite(images).flatten(1).all(1)
        images = images.nan_to_num().clamp(0, 1)
        # Rounded as diffusers' image processor does, half to even.
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self._stages.decode += time.perf_counter() - started
        return list(pixels), finite.tolist()

    def _check(self, pixels: list[np.ndarray]) -> list[Verdict]:
        if self._judge is None:
            return [Verdict()] * len(pixels)
        started = time.perf_counter()
        verdicts = self._judge.judge(pixels)
        self._stages.check += time.perf_counter() - started
        return verdicts


class _Ahead:
    """An iterator that can be looked into by one item, and gives up its items size by size."""

    def __init__(self, source: Iterator[PromptRequest]) -> None:
        self._source = source
        self._next: PromptRequest | None = None

    def peek(self) -> PromptRequest | None:
        if self._next is None:
            self._next = next(self._source, None)
        return self._next

    def has(self, size: Shape) -> bool:
        ahead = self.peek()
        return ahead is not None and (ahead.params.height, ahead.params.width) == size

    def take(self, size: Shape, most: int) -> list[PromptRequest]:
        """Up to `most` next items, as long as they are of this size."""
        taken: list[PromptRequest] = []
        while len(taken) < most and self.has(size) and (ahead := self.peek()) is not None:
            taken.append(ahead)
            self._next = None
        return taken


def _not_finite(params: SamplingParams, dtype: torch.dtype) -> str:
    advice = "" if dtype == torch.float32 else ", or compute with --dtype float32"
    return (
        f"the model gave values that are not finite at {params.num_inference_steps} steps and guidance_scale "
        f"{params.guidance_scale:g}; try other values{advice}"
    )
