"""Requests on their way to the slots: looked into by one, and waiting with their prompts encoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batch_infer.chain.outcomes import Size
from batch_infer.records import PromptRequest

if TYPE_CHECKING:
    from batch_infer.models import Conditioning


@dataclass(slots=True)
class Waiting:
    """Requests of one size whose prompts are encoded."""

    by_slots: dict[int, deque[tuple[int, PromptRequest, Conditioning]]] = field(
        default_factory=lambda: {1: deque(), 2: deque()}
    )
    came: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.by_slots.values()))

    def add(self, request: PromptRequest, conditioning: Conditioning) -> None:
        self.by_slots[request.params.slots].append((self.came, request, conditioning))
        self.came += 1

    def take(self, free: int) -> tuple[PromptRequest, Conditioning] | None:
        """The first row that fits: a single free slot goes to a row without guidance, if one waits."""
        fitting = [queue for slots, queue in self.by_slots.items() if queue and slots <= free]
        if not fitting:
            return None
        _, request, conditioning = min(fitting, key=lambda queue: queue[0][0]).popleft()
        return request, conditioning


class Ahead:
    """An iterator that can be looked into by one item, gives up its items size by size, and takes some back."""

    def __init__(self, source: Iterator[PromptRequest]) -> None:
        self._source = source
        self._next: deque[PromptRequest] = deque()

    def peek(self) -> PromptRequest | None:
        if not self._next:
            self._next.extend(item for item in [next(self._source, None)] if item is not None)
        return self._next[0] if self._next else None

    def has(self, size: Size) -> bool:
        ahead = self.peek()
        return ahead is not None and (ahead.params.height, ahead.params.width) == size

    def take(self, size: Size, most: int) -> list[PromptRequest]:
        """Up to `most` next items, as long as they are of this size."""
        taken: list[PromptRequest] = []
        while len(taken) < most and self.has(size):
            taken.append(self._next.popleft())
        return taken

    def put_back(self, requests: Iterable[PromptRequest]) -> None:
        """Give these out again before all others, in their order."""
        self._next.extendleft(reversed(list(requests)))
