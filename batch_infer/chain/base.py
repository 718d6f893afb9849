"""Define request sources, batch sizes and outcomes, and the base classes of chains."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from batch_infer.errors import FailedRowError, RowError
from batch_infer.records import Lora, PromptRequest, Verdict
from batch_infer.safety import ImageChecker
from batch_infer.stages import Stages

if TYPE_CHECKING:
    import numpy as np

    from batch_infer.models import AnyPipeline, Conditioning, LatentDiffusion

log = logging.getLogger("batch_infer")

IDLE_SECONDS = 0.2
"""Timeout in seconds with which an idle chain polls its source, so that it soon checks again whether to stop."""

Size: TypeAlias = tuple[int, int]
"""Height and width of an image in pixels."""
Stage: TypeAlias = Literal["denoise", "decode"]


@dataclass(frozen=True, slots=True)
class RenderedImage:
    """An image (H, W, 3) uint8, its safety verdict, and the seconds that the row spent in the slots."""

    request: PromptRequest
    pixels: np.ndarray
    verdict: Verdict
    conditioning: Conditioning
    slots: int
    seconds: float


@dataclass(frozen=True, slots=True)
class UnrenderedRow:
    """A request that yields no image.

    It is `invalid` if the model rejects its values, `blocked` if its prompt is refused, and otherwise `failed`.
    """

    request: PromptRequest
    status: Literal["invalid", "failed", "blocked"]
    error: str
    verdict: Verdict = Verdict()


RowOutcome: TypeAlias = RenderedImage | UnrenderedRow


class NoRequest(Enum):
    """Reason why a source returns no request."""

    NOT_YET = "more requests may come"
    END = "no more requests will come"


@runtime_checkable
class RequestSource(Protocol):
    """Supplies a chain with requests."""

    def poll(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
        """Return the next request, END, or NOT_YET if no request arrives within `timeout` seconds.

        A chain passes a timeout only if it is idle.
        """
        ...


class IteratorSource:
    """Supplies the items of an iterable. `poll` blocks as long as the iterator does and never returns NOT_YET."""

    def __init__(self, requests: Iterable[PromptRequest]) -> None:
        self._requests = iter(requests)

    def poll(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
        return next(self._requests, NoRequest.END)


def as_source(requests: Iterable[PromptRequest] | RequestSource) -> RequestSource:
    return requests if isinstance(requests, RequestSource) else IteratorSource(requests)


def size_of(request: PromptRequest) -> Size:
    return request.params.height, request.params.width


class ReadAhead:
    """Lets a chain look at the next request of a source before taking it, and put requests back."""

    def __init__(self, source: RequestSource) -> None:
        self._source = source
        self._requests: deque[PromptRequest] = deque()

    def peek(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
        """Return the next request without removing it, or the reason why there is none."""
        if self._requests:
            return self._requests[0]
        request = self._source.poll(timeout)
        if isinstance(request, PromptRequest):
            self._requests.append(request)
        return request

    def has(self, group: object) -> bool:
        """Return whether there is a next request, and it has this `group_key`."""
        request = self.peek()
        return isinstance(request, PromptRequest) and request.group_key == group

    def take(self, group: object, limit: int) -> list[PromptRequest]:
        """Remove and return the next requests of a group, up to `limit` and as far as they are available."""
        requests: list[PromptRequest] = []
        while len(requests) < limit and self.has(group):
            requests.append(self._requests.popleft())
        return requests

    def put_back(self, requests: Sequence[PromptRequest]) -> None:
        """Insert requests at the front, in their order."""
        self._requests.extendleft(reversed(requests))


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Batch elements per denoiser call (`slots`) and images per decoder or checker call (`decode`).

    A row with guidance uses two slots. `by_size` overrides both values for individual image sizes.
    """

    slots: int
    decode: int
    by_size: Mapping[Size, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for slots, decode in ((self.slots, self.decode), *self.by_size.values()):
            if slots < 1 or decode < 1:
                raise ValueError(f"{self}: a call has at least one batch element")

    def for_size(self, size: Size) -> tuple[int, int]:
        """Return the slots and the decoder batch size for an image size."""
        return self.by_size.get(size, (self.slots, self.decode))

    def halve(self, size: Size, stage: Stage, min_slots: int = 2) -> BatchSizes | None:
        """Return a copy in which the batch size of a stage is halved for one image size.

        If that size is at its minimum, the other stage's is halved. Returns None if both are at their minimum.
        """
        slots, decode = self.for_size(size)
        can_halve_slots = slots >= 2 * min_slots
        if not can_halve_slots and decode < 2:
            return None
        halve_slots = decode < 2 or (stage == "denoise" and can_halve_slots)
        smaller = (slots // 2, decode) if halve_slots else (slots, decode // 2)
        return replace(self, by_size={**self.by_size, size: smaller})


class Chain(ABC):
    """Renders requests on one device and may check the images. The worker stores the images on other threads."""

    model: LatentDiffusion | AnyPipeline
    stages_by_size: dict[Size, Stages]

    @property
    @abstractmethod
    def batch_sizes(self) -> BatchSizes:
        """The current batch sizes. They shrink when the device runs out of memory."""

    @property
    def stages(self) -> Stages:
        """Times and counts, summed over all image sizes."""
        return sum(self.stages_by_size.values(), Stages())

    @abstractmethod
    def render(self, requests: Iterable[PromptRequest] | RequestSource) -> Iterator[RowOutcome]:
        """Render requests and yield outcomes in the order in which they finish.

        Requests with the same `group_key` should be adjacent, because only adjacent requests can share a batch. If the
        device runs out of memory, the chain makes later batches smaller and renders the unfinished rows again. They
        fail if batches cannot be smaller.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection to the safety service, if there is one."""


class DeviceChain(Chain):
    """Base class of the chains that render. GatedChain delegates to a DeviceChain."""

    def __init__(self, model: Any, batch_sizes: BatchSizes, checker: ImageChecker | None, stop: Callable[[], bool]):
        self.model, self._batch_sizes, self._checker, self._stop = model, batch_sizes, checker, stop
        self.stages_by_size = {}
        self._unfit: dict[Lora, str] = {}
        """Why the model cannot use some LoRAs."""
        self._failed: tuple[Lora, str] | None = None
        """The last LoRA, if switching to it failed, and why."""

    @property
    def batch_sizes(self) -> BatchSizes:
        return self._batch_sizes

    def close(self) -> None:
        pass

    def render(self, requests: Iterable[PromptRequest] | RequestSource) -> Iterator[RowOutcome]:
        for outcomes in self.steps(as_source(requests)):
            yield from outcomes

    def steps(self, source: RequestSource) -> Iterator[Sequence[RowOutcome]]:
        """Render requests and yield new outcomes, possibly none, at least once per step.

        The caller can do other work in between.
        """
        requests, started = ReadAhead(source), time.perf_counter()
        while (first := requests.peek(IDLE_SECONDS)) is not NoRequest.END and not self._stop():
            if isinstance(first, PromptRequest):
                stages = self.stages_by_size.setdefault(size_of(first), Stages())
                compilation = stages.compilation
                if (error := self._switch_lora(first.lora)) is None:
                    yield from self._render_next(requests, first, stages)
                else:
                    requests.take(first.group_key, 1)
                    yield [
                        UnrenderedRow(first, "failed" if isinstance(error, FailedRowError) else "invalid", str(error))
                    ]
                stages.seconds += time.perf_counter() - started - (stages.compilation - compilation)
            else:
                yield ()
            started = time.perf_counter()

    def _switch_lora(self, lora: Lora | None) -> RowError | None:
        """Let the model use the LoRA of the next rows, and return the error if that fails."""
        if lora is not None and lora in self._unfit:
            return RowError(self._unfit[lora])
        if self._failed is not None and self._failed[0] == lora:
            return FailedRowError(self._failed[1])
        self._failed = None
        try:
            self.model.use_lora(lora)
        except FailedRowError as error:
            if lora is not None:
                self._failed = lora, str(error)
            return FailedRowError(str(error))
        except RowError as error:  # the error itself would keep the tensors of the LoRA alive
            if lora is not None:
                self._unfit[lora] = str(error)
            return RowError(str(error))
        return None

    @abstractmethod
    def _render_next(self, requests: ReadAhead, first: PromptRequest, stages: Stages) -> Iterator[Sequence[RowOutcome]]:
        """Render `first`, which is next, and the following requests that can share its batch. See `steps`."""

    def _retry_or_fail(
        self, requests: ReadAhead, rows: Sequence[PromptRequest], size: Size, change: str | None, message: str
    ) -> list[RowOutcome]:
        """Put back the rows of a batch that ran out of memory, or return them as failed.

        `change` describes the smaller batch for the log. If it is None, the batch cannot shrink further and the rows
        fail.
        """
        height, width = size
        if change is None:
            error = f"one image of {width}x{height} pixels does not fit into the device's memory ({message})"
            return [UnrenderedRow(row, "failed", error) for row in rows]
        log.warning("out of memory at %dx%d pixels: continuing with %s", width, height, change)
        requests.put_back(rows)
        return []
