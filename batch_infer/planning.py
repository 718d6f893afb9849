"""Order pending requests, and estimate the cost of rendering them."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import groupby
from typing import Protocol, TypeAlias, TypeVar

from batch_infer.admission import WaitingRows
from batch_infer.carried import estimate_bytes
from batch_infer.records import FINAL_STATUSES, MAX_ATTEMPTS, Lora, PromptRequest, ResultRow, RowCost

WINDOW = 8192
"""Maximum number of requests to sort together, so that memory does not grow with the table."""
WINDOW_BYTES = 64 << 20
"""Size in bytes of the texts and carried cells at which a window ends early."""
MAX_BALANCED_ROWS = 2048
"""Maximum number of rows of one size to balance over the slots. With more rows, idle slots at the end cost little."""

SlotsForSize: TypeAlias = "Callable[[tuple[int, int]], int]"
"""Returns the number of slots for an image size (height, width)."""
Item: TypeAlias = PromptRequest | ResultRow
Row = TypeVar("Row", PromptRequest, ResultRow, Item)


class ManifestEntry(Protocol):
    """The fields of an image's manifest entry that planning uses."""

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
    def find(self, key: tuple[str, int]) -> ManifestEntry | None: ...


SkipRule: TypeAlias = "Callable[[Item, ManifestEntry | None], bool]"
"""Returns whether a command skips an item with this manifest entry."""


def get_source(item: Item) -> tuple[str, int]:
    """Return an item's file name and row number."""
    return item.source.file, item.source.row


def is_finished(item: Item, entry: ManifestEntry | None) -> bool:
    """Return whether `run` skips an item.

    It does so if the fingerprint is unchanged, and the row has a final status, failed MAX_ATTEMPTS times or is still
    invalid.
    """
    if entry is None or entry.fingerprint != item.fingerprint:
        return False
    if isinstance(item, ResultRow):
        return entry.status == item.status
    return entry.status in FINAL_STATUSES or (entry.status == "failed" and entry.failures >= MAX_ATTEMPTS)


def make_finished_check(index: ManifestLookup) -> Callable[[PromptRequest], bool]:
    """Return a function that checks whether the manifest has a final result for a request's fingerprint."""

    def has_final_result(request: PromptRequest) -> bool:
        entry = index.find(request.key)
        return entry is not None and entry.status in FINAL_STATUSES and entry.fingerprint == request.fingerprint

    return has_final_result


def select_pending(
    items: Iterable[Item], index: ManifestLookup, is_skipped: SkipRule = is_finished
) -> Iterator[PromptRequest]:
    """Yield the requests to render with their attempt numbers, without invalid rows."""
    for item in items:
        if isinstance(item, PromptRequest) and not is_skipped(item, entry := index.find(item.key)):
            yield item if entry is None else replace(item, attempt=entry.attempt + 1, replaces=entry.path)


def order_requests(requests: Iterable[PromptRequest], get_slots: SlotsForSize | None = None) -> Iterator[PromptRequest]:
    """Yield requests in rendering order, window by window.

    In a window, rows with one size and LoRA are adjacent, since all slots must empty before these change. Among these
    rows, those with many steps come first, so that slots are idle only briefly at the end. `get_slots` returns the
    total number of slots of all devices for a size. With it, up to MAX_BALANCED_ROWS rows of one size are also
    balanced, so that all slots become idle at about the same time.
    """
    for window in split_batches(requests, WINDOW, WINDOW_BYTES):
        for _, group in groupby(sorted(window, key=_make_sort_key), key=lambda request: request.group_key):
            rows = list(group)
            if get_slots is not None and len(rows) <= MAX_BALANCED_ROWS:
                rows = _balance(rows, max(1, get_slots(_get_size(rows[0])) // 2))
            yield from rows


def split_batches(items: Iterable[Row], count: int, size: int) -> Iterator[list[Row]]:
    """Yield lists of at most `count` items. A list ends early if it reaches `size` bytes."""
    batch: list[Row] = []
    total = 0
    for item in items:
        batch.append(item)
        total += estimate_bytes((item.prompt, item.negative_prompt)) + estimate_bytes(item.carried.values())
        if len(batch) >= count or total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _get_size(request: PromptRequest) -> tuple[int, int]:
    return request.params.height, request.params.width


def _make_sort_key(request: PromptRequest) -> tuple[object, ...]:
    params = request.params
    longest_first = -params.num_inference_steps, not params.uses_guidance
    lora = ("", 0.0) if request.lora is None else (str(request.lora.path), request.lora.weight)
    return *_get_size(request), *lora, *longest_first, request.id, request.image_index


def _balance(rows: list[PromptRequest], lane_count: int) -> list[PromptRequest]:
    """Order rows by their start in a schedule in which all lanes end at about the same time.

    `rows` must be sorted, longest first. A lane is two slots, for one row with guidance or two rows without. A
    binary search finds a short length for which first-fit decreasing succeeds (MULTIFIT: Coffman, Garey & Johnson,
    SIAM J. Comput. 7, 1978).
    """
    single = [row for row in rows if not row.params.uses_guidance]
    pieces = [[row] for row in rows if row.params.uses_guidance]
    pieces += [single[index : index + 2] for index in range(0, len(single), 2)]
    pieces.sort(key=_get_steps, reverse=True)
    total, longest = sum(map(_get_steps, pieces)), _get_steps(pieces[0])
    low, high = max(-(-total // lane_count), longest), 2 * total // lane_count + longest
    shortest = low + bisect_left(range(low, high), True, key=lambda end: bool(_schedule(pieces, lane_count, end)))
    starts = _schedule(pieces, lane_count, shortest) or [0] * len(pieces)
    order = sorted(range(len(pieces)), key=lambda index: (starts[index], index))
    return [row for index in order for row in pieces[index]]


def _get_steps(piece: list[PromptRequest]) -> int:
    return piece[0].params.num_inference_steps


def _schedule(pieces: list[list[PromptRequest]], lane_count: int, length: int) -> list[int] | None:
    """Assign each piece to the first lane with room. Return the start of each piece, or None if one does not fit."""
    lane_ends, starts = [0] * lane_count, []
    for piece in pieces:
        steps = _get_steps(piece)
        lane = next((lane for lane, end in enumerate(lane_ends) if end + steps <= length), None)
        if lane is None:
            return None
        starts.append(lane_ends[lane])
        lane_ends[lane] += steps
    return starts


@dataclass(slots=True)
class SizeCost:
    """Cost of all rows of one image size.

    `row_forwards` counts the batch elements that rows use in denoiser calls, usually two per call for a row with
    guidance. `ticks` counts denoiser calls over all slots.
    """

    slots: int
    images: int = 0
    row_forwards: int = 0
    ticks: int = 0


class BatchingEstimator:
    """Simulates step-level batching. `costs` contains the cost of each image size (height, width).

    All slots empty before the size or the LoRA changes. Otherwise, rows are prepared and admitted as the batchers in
    `chain` do.
    """

    def __init__(self, get_slots: SlotsForSize) -> None:
        self.costs: dict[tuple[int, int], SizeCost] = {}
        self._get_slots = get_slots
        self._group: tuple[int, int, Lora | None] | None = None
        self._incoming: deque[RowCost] = deque()
        self._waiting = _make_waiting_rows(0)
        self._running: list[tuple[int, int]] = []
        """A heap of the ticks at which rows end, and the slots that they free."""
        self._now = self._free = 0

    def add(self, request: PromptRequest, row: RowCost) -> None:
        """Add a row."""
        size = _get_size(request)
        cost = self.costs.get(size)
        if self._group != request.group_key or cost is None:
            self.close()
            cost = self.costs.setdefault(size, SizeCost(self._get_slots(size)))
            self._group, self._free, self._waiting = request.group_key, cost.slots, _make_waiting_rows(cost.slots)
        cost.images += 1
        cost.row_forwards += row.slots * row.evaluations
        if row.is_alone:
            cost.ticks += row.evaluations
        else:
            self._incoming.append(row)
            self._simulate(cost, is_last=False)

    def close(self) -> None:
        """Finish all rows of the current size and LoRA."""
        if self._group is not None:
            cost = self.costs[self._group[:2]]
            self._simulate(cost, is_last=True)
            cost.ticks += self._now
        self._now, self._group = 0, None

    def _simulate(self, cost: SizeCost, *, is_last: bool) -> None:
        """Advance the simulation as far as the rows added so far determine it, or to its end."""
        while True:
            room = self._waiting.room
            if room > len(self._incoming) and not is_last:
                return
            for _ in range(min(room, len(self._incoming))):
                self._waiting.add(self._incoming.popleft())
            for row in self._waiting.admit(self._free):
                slots = min(row.slots, cost.slots)
                self._free -= slots
                heappush(self._running, (self._now + row.evaluations, slots))
            if not self._running:
                return
            will_prepare = (self._incoming or not is_last) and self._waiting.room
            self._now = self._now + 1 if will_prepare else self._running[0][0]
            while self._running and self._running[0][0] <= self._now:
                self._free += heappop(self._running)[1]


def _make_waiting_rows(slots: int) -> WaitingRows[RowCost]:
    return WaitingRows(slots, lambda row: row.slots)
