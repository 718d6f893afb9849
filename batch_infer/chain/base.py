"""What all chains share: outcomes, batch sizes, and the loop over requests."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from batch_infer.chain.sources import NoRequest, ReadAhead, RequestSource, Size, as_source, size_of
from batch_infer.records import PromptRequest, Verdict
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    import numpy as np

    from batch_infer.models import AnyPipeline, Conditioning, LatentDiffusion

log = logging.getLogger("batch_infer")

IDLE_SECONDS = 0.2
"""How long an idle chain waits for a request before it checks whether to stop."""

Stage: TypeAlias = Literal["denoise", "decode"]


@dataclass(frozen=True, slots=True)
class RenderedImage:
    """An image (H, W, 3) uint8 and its safety verdict. `seconds` passed while the row was denoised."""

    request: PromptRequest
    pixels: np.ndarray
    verdict: Verdict
    conditioning: Conditioning
    slots: int
    seconds: float


@dataclass(frozen=True, slots=True)
class UnrenderedRow:
    """A request without an image: `invalid` if the model refuses its values, `blocked` if its prompt is unsafe."""

    request: PromptRequest
    status: Literal["invalid", "failed", "blocked"]
    error: str
    verdict: Verdict = Verdict()


RowOutcome: TypeAlias = RenderedImage | UnrenderedRow


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The UNet batch size (`slots`) and the batch size of decoder and checker, with exceptions by image size.

    Slots count batch elements: a row with guidance uses two.
    """

    slots: int
    decode: int
    by_size: Mapping[Size, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for slots, decode in ((self.slots, self.decode), *self.by_size.values()):
            if slots < 2 or decode < 1:
                raise ValueError(
                    f"{self}: a row with guidance takes two slots, and an image one place in a decoder call"
                )

    def for_size(self, size: Size) -> tuple[int, int]:
        """Return the slots and the decoder batch size for an image size."""
        return self.by_size.get(size, (self.slots, self.decode))

    def halve(self, size: Size, stage: Stage) -> BatchSizes | None:
        """Halve the batch size of a stage for one image size, or that of the other stage if it cannot be halved.

        Returns None if neither can.
        """
        slots, decode = self.for_size(size)
        if slots < 4 and decode < 2:
            return None
        halve_slots = decode < 2 or (stage == "denoise" and slots >= 4)
        smaller = (slots // 2, decode) if halve_slots else (slots, decode // 2)
        return replace(self, by_size={**self.by_size, size: smaller})


class Chain(ABC):
    """Renders requests on one device, up to checked images in memory.

    Compressing, hashing and writing them is the worker's task, on other threads.
    """

    uses_pipeline_call: bool
    """Whether a diffusers pipeline runs the denoising loop."""
    model: LatentDiffusion | AnyPipeline
    stages_by_size: dict[Size, Stages]

    @property
    @abstractmethod
    def batch_sizes(self) -> BatchSizes:
        """The current batch sizes, smaller than the initial ones after the device ran out of memory."""

    @property
    def stages(self) -> Stages:
        """Stages summed over all image sizes."""
        return sum(self.stages_by_size.values(), Stages())

    @abstractmethod
    def render(self, requests: Iterable[PromptRequest] | RequestSource) -> Iterator[RowOutcome]:
        """Render requests and yield outcomes in the order in which they finish.

        Requests of one size, or for pipeline-call batching of one `batch_key`, should be adjacent: a change empties
        the slots. On out-of-memory the batch size is halved, and rows that were in the batch are rendered again.
        """

    @abstractmethod
    def close(self) -> None:
        """Release connections."""


class DeviceChain(Chain):
    """A chain that renders by itself, as opposed to one that adds checks around another."""

    def __init__(self, model: Any, batch_sizes: BatchSizes, checker: ImageChecker | None, stop: Callable[[], bool]):
        self.model, self._batch_sizes, self._checker, self._stop = model, batch_sizes, checker, stop
        self.stages_by_size = {}

    @property
    def batch_sizes(self) -> BatchSizes:
        return self._batch_sizes

    def close(self) -> None:
        pass

    def render(self, requests: Iterable[PromptRequest] | RequestSource) -> Iterator[RowOutcome]:
        for outcomes in self.steps(as_source(requests)):
            yield from outcomes

    def steps(self, source: RequestSource) -> Iterator[Sequence[RowOutcome]]:
        """Render requests and yield, at least once per UNet or pipeline call, the outcomes that became ready.

        The sequence may be empty. The caller can do its own work between calls, and poll its own events.
        """
        requests, started = ReadAhead(source), time.perf_counter()
        while (first := requests.peek(IDLE_SECONDS)) is not NoRequest.END and not self._stop():
            if isinstance(first, PromptRequest):
                stages = self.stages_by_size.setdefault(size_of(first), Stages())
                compilation = stages.compilation
                yield from self._render_next(requests, first, stages)
                stages.seconds += time.perf_counter() - started - (stages.compilation - compilation)
            else:
                yield ()
            started = time.perf_counter()

    @abstractmethod
    def _render_next(self, requests: ReadAhead, first: PromptRequest, stages: Stages) -> Iterator[Sequence[RowOutcome]]:
        """Render the next requests, as many as share a batch with the first one. See `steps`."""

    def _retry(
        self, requests: ReadAhead, rows: Sequence[PromptRequest], size: Size, change: str
    ) -> list[UnrenderedRow]:
        """Put the rows of a batch that ran out of memory back, and log which batch size is used from now on."""
        log.warning("out of memory at %dx%d pixels: going on with %s", size[1], size[0], change)
        requests.put_back(rows)
        return []

    def _fail(self, rows: Sequence[PromptRequest], size: Size, message: str) -> list[UnrenderedRow]:
        """Return the failures of rows of which not even the smallest batch fits into memory."""
        error = f"the device's memory does not hold one image of {size[1]}x{size[0]} pixels ({message})"
        return [UnrenderedRow(row, "failed", error) for row in rows]
