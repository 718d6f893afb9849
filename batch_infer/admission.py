"""Decide which rows to prepare, and which of the prepared rows to admit to free slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Waiting(Generic[T]):
    row: T
    overtaken: int = 0
    """How many younger rows have been admitted before this one."""


class WaitingRows(Generic[T]):
    """Rows that wait to be admitted, oldest first.

    If too few slots are free for a row, younger rows that fit may overtake it, but only as many as there are slots.
    Otherwise, a row with guidance, which usually needs two slots, could wait forever while rows without it keep coming.
    A row that needs more than all slots is admitted when all are free.
    """

    def __init__(self, slots: int, count_needed: Callable[[T], int]) -> None:
        """`count_needed` returns how many slots a row needs."""
        self._slots, self._count_needed = slots, count_needed
        self._rows: deque[_Waiting[T]] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def room(self) -> int:
        """How many rows to prepare now.

        When at most one row per two slots is waiting, their number is increased to one per slot.
        """
        return 0 if len(self._rows) > self._slots // 2 else self._slots - len(self._rows)

    def add(self, row: T) -> None:
        self._rows.append(_Waiting(row))

    def admit(self, free: int) -> list[T]:
        """Remove and return the rows to admit when this many slots are free."""
        admitted: list[T] = []
        kept: deque[_Waiting[T]] = deque()
        for waiting in self._rows:
            needed = self._count_needed(waiting.row)
            # The oldest row has been overtaken most often.
            may_overtake = not kept or kept[0].overtaken < self._slots
            if may_overtake and (needed <= free or free == self._slots):
                admitted.append(waiting.row)
                free -= needed
                for older in kept:
                    older.overtaken += 1
            else:
                kept.append(waiting)
        self._rows = kept
        return admitted

    def discard(self, row: T) -> None:
        """Remove a row, if it is waiting."""
        self._rows = deque(waiting for waiting in self._rows if waiting.row is not row)

    def clear(self) -> None:
        self._rows.clear()
