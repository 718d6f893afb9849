"""The plan: what is not done yet, in chunks of one size with the dearest rows first, and what that will cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from typing import Protocol, TypeAlias

from batch_infer.records import FINAL, MAX_ATTEMPTS, PromptRequest, ResultRow, digest

WINDOW = 8192
"""Requests that are looked at together: memory does not grow with the table."""
CHUNK = 256
"""Requests that a worker claims at once."""


class Committed(Protocol):
    """What the manifest holds of an image."""

    @property
    def status(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def failures(self) -> int: ...
    @property
    def path(self) -> str | None: ...


class Index(Protocol):
    """What is asked of the manifest."""

    def find(self, key: tuple[str, int]) -> Committed | None: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """Requests of one size: the unit that workers claim."""

    requests: tuple[PromptRequest, ...]

    @property
    def name(self) -> str:
        """Says what the chunk holds."""
        return digest([[request.id, request.image_index, request.fingerprint] for request in self.requests])


Item: TypeAlias = PromptRequest | ResultRow
LeavesAlone: TypeAlias = "Callable[[Item, Committed | None], bool]"
"""Says of an item, and of what the manifest holds of it, whether a command leaves it as it is."""


def is_done(item: Item, found: Committed | None) -> bool:
    """Whether a run leaves this item as the manifest has it."""
    if found is None or found.fingerprint != item.fingerprint:
        return False
    if isinstance(item, ResultRow):
        return found.status == item.status
    return found.status in FINAL or (found.status == "failed" and found.failures >= MAX_ATTEMPTS)


def pending(rows: Iterable[Item], index: Index, leaves_alone: LeavesAlone = is_done) -> Iterator[PromptRequest]:
    """The requests that are to be done, each as the attempt that it will be; invalid rows are somebody else's."""
    for item in rows:
        if isinstance(item, PromptRequest) and not leaves_alone(item, found := index.find(item.key)):
            yield item if found is None else item.again(found.attempt + 1, found.path)


def chunks(requests: Iterable[PromptRequest]) -> Iterator[Chunk]:
    """Cut requests into chunks, window by window.

    Rows of one size stand together, since a change of size empties the slots. Long rows stand before short ones, so
    that what is left at the end, when slots run empty, is short.
    """
    source = iter(requests)
    while window := sorted(islice(source, WINDOW), key=_order):
        start = 0
        while start < len(window):
            size = _size(window[start])
            piece = tuple(request for request in window[start : start + CHUNK] if _size(request) == size)
            start += len(piece)
            yield Chunk(piece)


def _size(request: PromptRequest) -> tuple[int, int]:
    return request.params.height, request.params.width


def _order(request: PromptRequest) -> tuple[object, ...]:
    params = request.params
    return *_size(request), -params.num_inference_steps, not params.guided, request.id, request.image_index


@dataclass(slots=True)
class Load:
    """What the rows of one size cost: images, row-forwards (rows of UNet calls), ticks (UNet calls over all slots)."""

    images: int = 0
    row_forwards: int = 0
    ticks: int = 0


class Packing:
    """How rows will fill `size` slots, on paper: `loads` says by image size (height, width) what they cost.

    Rows are taken in the order in which they are handed in, each as soon as its slots are free, and all slots empty
    before the size changes. The packer does so too, but for a row without guidance, which it lets pass one that
    waits for a second slot.
    """

    def __init__(self, size: int) -> None:
        self.loads: dict[tuple[int, int], Load] = {}
        self._size, self._free = size, size
        self._now = self._last = 0
        self._under_way: list[tuple[int, int]] = []
        self._load: tuple[tuple[int, int], Load] | None = None

    def add(self, request: PromptRequest, evaluations: int) -> None:
        """Take in a row that asks the model `evaluations` times."""
        if self._load is None or self._load[0] != _size(request):
            self.close()
            self._load = _size(request), self.loads.setdefault(_size(request), Load())
        load, needed = self._load[1], request.params.slots
        while self._free < needed:
            self._now, freed = heappop(self._under_way)
            self._free += freed
        self._free -= needed
        heappush(self._under_way, (self._now + evaluations, needed))
        self._last = max(self._last, self._now + evaluations)
        load.images += 1
        load.row_forwards += needed * evaluations

    def close(self) -> None:
        """Let the rows under way come to their end."""
        if self._load is not None:
            self._load[1].ticks += self._last
        self._now, self._last, self._free, self._load = 0, 0, self._size, None
        self._under_way.clear()
