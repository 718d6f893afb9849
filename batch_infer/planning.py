"""The plan: what is not done yet, size by size with the dearest rows first, and what that will cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby
from typing import Protocol, TypeAlias, TypeVar

from batch_infer.carried import estimate_bytes
from batch_infer.records import FINAL_STATUSES, MAX_ATTEMPTS, PromptRequest, ResultRow

WINDOW = 8192
"""Requests that are looked at together: memory does not grow with the table."""
WINDOW_BYTES = 64 << 20
"""Bytes of their texts and carried cells, beyond which fewer are."""
FEW = 2048
"""Rows of a size that are dealt out to level lanes; of more, what runs empty at the end is little anyway."""

SlotsOf: TypeAlias = "Callable[[tuple[int, int]], int]"
"""The slots that there are for an image size (height, width)."""


class ManifestEntry(Protocol):
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


class ManifestLookup(Protocol):
    """What is asked of the manifest."""

    def find(self, key: tuple[str, int]) -> ManifestEntry | None: ...


Item: TypeAlias = PromptRequest | ResultRow
Row = TypeVar("Row", PromptRequest, Item)


def source_of(item: Item) -> tuple[str, int]:
    """Where a row stands: the name of its file, and its number."""
    if isinstance(item, PromptRequest):
        return item.source.file, item.source.row
    return item.source_file, item.source_row


SkipRule: TypeAlias = "Callable[[Item, ManifestEntry | None], bool]"
"""Says of an item, and of what the manifest holds of it, whether a command leaves it as it is."""


def is_done(item: Item, found: ManifestEntry | None) -> bool:
    """Whether a run leaves this item as the manifest has it."""
    if found is None or found.fingerprint != item.fingerprint:
        return False
    if isinstance(item, ResultRow):
        return found.status == item.status
    return found.status in FINAL_STATUSES or (found.status == "failed" and found.failures >= MAX_ATTEMPTS)


def make_finished_check(index: ManifestLookup) -> Callable[[PromptRequest], bool]:
    """Return the test whether the manifest has a final result of a request as it is now."""

    def is_finished(request: PromptRequest) -> bool:
        match = index.find(request.key)
        return match is not None and match.status in FINAL_STATUSES and match.fingerprint == request.fingerprint

    return is_finished


def select_pending(
    rows: Iterable[Item], index: ManifestLookup, leaves_alone: SkipRule = is_done
) -> Iterator[PromptRequest]:
    """The requests that are to be done, each as the attempt that it will be; invalid rows are somebody else's."""
    for item in rows:
        if isinstance(item, PromptRequest) and not leaves_alone(item, found := index.find(item.key)):
            yield item if found is None else item.as_attempt(found.attempt + 1, found.path)


def order_requests(requests: Iterable[PromptRequest], slots_of: SlotsOf | None = None) -> Iterator[PromptRequest]:
    """Requests in the order in which they are to be rendered, window by window.

    Rows of one size stand together, since a change of size empties the slots. Long rows stand before short ones, so
    that what is left at the end, when slots run empty, is short. With `slots_of`, the slots that rows of a size will
    be packed into (those of all devices), few rows are also put so that all slots run empty at about the same time.
    """
    for window in split_batches(requests, WINDOW, WINDOW_BYTES):
        for size, group in groupby(sorted(window, key=_order), key=_size):
            alike = list(group)
            if slots_of is not None and len(alike) <= FEW:
                alike = _level(alike, slots_of(size) // 2)
            yield from alike


def split_batches(items: Iterable[Row], number: int, size: int) -> Iterator[list[Row]]:
    """Items in batches of at most so many, of which only the last may pass the size, in bytes."""
    batch: list[Row] = []
    total = 0
    for item in items:
        batch.append(item)
        total += estimate_bytes((item.prompt, item.negative_prompt)) + estimate_bytes(item.carried.values())
        if len(batch) >= number or total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _level(rows: list[PromptRequest], lanes: int) -> list[PromptRequest]:
    """Rows, the longest first, in the order in which they begin where they are dealt out to lanes of like length.

    A lane is two slots: a row with guidance, or two without beside each other. The length is the least that first-fit
    decreasing finds room in (MULTIFIT: Coffman, Garey & Johnson, SIAM J. Comput. 7, 1978).
    """
    single = [row for row in rows if not row.params.uses_guidance]
    pieces = [[row] for row in rows if row.params.uses_guidance]
    pieces = sorted(pieces + [single[k : k + 2] for k in range(0, len(single), 2)], key=_steps, reverse=True)
    total, longest = sum(map(_steps, pieces)), _steps(pieces[0])
    least, enough = max(-(-total // lanes), longest), 2 * total // lanes + longest
    while least < enough:
        length = (least + enough) // 2
        least, enough = (least, length) if _deal(pieces, lanes, length) else (length + 1, enough)
    starts = _deal(pieces, lanes, enough) or [0] * len(pieces)
    order = sorted(range(len(pieces)), key=lambda k: (starts[k], k))
    return [row for k in order for row in pieces[k]]


def _steps(piece: list[PromptRequest]) -> int:
    return piece[0].params.num_inference_steps


def _deal(pieces: list[list[PromptRequest]], lanes: int, length: int) -> list[int] | None:
    """When each piece begins if each goes to the first lane that has room for it; None where one finds no room."""
    filled, starts = [0] * lanes, []
    for piece in pieces:
        steps = _steps(piece)
        lane = next((lane for lane, used in enumerate(filled) if used + steps <= length), None)
        if lane is None:
            return None
        starts.append(filled[lane])
        filled[lane] += steps
    return starts


def _size(request: PromptRequest) -> tuple[int, int]:
    return request.params.height, request.params.width


def _order(request: PromptRequest) -> tuple[object, ...]:
    params = request.params
    dear = -params.num_inference_steps, not params.uses_guidance
    # Rows that are alike stand together: a pipeline that is driven by its own call makes them in one.
    alike = params.guidance_scale, params.guidance_rescale, request.negative_prompt is None
    return *_size(request), *dear, *alike, request.id, request.image_index


@dataclass(slots=True)
class SizeCost:
    """What the rows of one size cost: images, row-forwards (rows of UNet calls), ticks (UNet calls over all slots)."""

    slots: int
    images: int = 0
    row_forwards: int = 0
    ticks: int = 0


class StepBatchingEstimator:
    """How rows will fill the slots, on paper: `loads` says by image size (height, width) what they cost.

    Rows are taken in the order in which they are handed in, each as soon as its slots are free, and all slots empty
    before the size changes. The packer does so too, but for a row without guidance, which it lets pass one that
    waits for a second slot.
    """

    def __init__(self, slots_of: SlotsOf) -> None:
        """`slots_of`: the slots that there are for an image size."""
        self.loads: dict[tuple[int, int], SizeCost] = {}
        self._slots_of, self._free = slots_of, 0
        self._now = self._last = 0
        self._under_way: list[tuple[int, int]] = []
        self._load: tuple[tuple[int, int], SizeCost] | None = None

    def add(self, request: PromptRequest, evaluations: int) -> None:
        """Take in a row that asks the model `evaluations` times."""
        if self._load is None or self._load[0] != _size(request):
            self.close()
            size = _size(request)
            self._free = self._slots_of(size)
            self._load = size, self.loads.setdefault(size, SizeCost(self._free))
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
        self._now, self._last, self._load = 0, 0, None
        self._under_way.clear()


class PipelineBatchingEstimator:
    """How rows will fill the calls of a pipeline that makes only rows which are alike in one; asked as `Packing` is.

    Slots are row-forwards in a call of the network here too, so that a call makes half as many rows with guidance.
    """

    def __init__(self, slots_of: SlotsOf) -> None:
        self.loads: dict[tuple[int, int], SizeCost] = {}
        self._slots_of = slots_of
        self._alike: tuple[object, ...] | None = None
        self._room = 0

    def add(self, request: PromptRequest, evaluations: int) -> None:
        """Take in a row of so many steps."""
        size, each = _size(request), request.params.slots
        if size not in self.loads:
            self.loads[size] = SizeCost(self._slots_of(size))
        load = self.loads[size]
        if self._alike != request.batch_key or not self._room:
            self._alike, self._room = request.batch_key, load.slots // each
            load.ticks += evaluations
        self._room -= 1
        load.images += 1
        load.row_forwards += each * evaluations

    def close(self) -> None:
        """A batch that is not full is made as it is."""
        self._alike = None
