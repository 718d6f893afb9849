"""The ledger: which rows are with which worker, and what is done about those that a worker has died with."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

from batch_infer.records import PromptRequest

CHUNK = 32
"""Rows that a worker is handed at once. Near the end they are fewer, so that all workers finish together."""
APART = 16
"""Rows that are tried together once a worker has died with them."""
STRIKES = 3
"""A row with which so many workers have died, the last with it alone, has failed."""

Key = tuple[str, int]


Item = TypeVar("Item")


def primed(items: Iterable[Item]) -> Iterator[Item]:
    """Return the same items, the first of them ready: to sort rows, all tables are read."""
    source = iter(items)
    return chain(list(islice(source, 1)), source)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows for a worker; those `apart` are rendered and committed by themselves before it takes others."""

    requests: tuple[PromptRequest, ...]
    apart: bool = False


class Ledger:
    """Hands out rows. Every row is with one worker, waits, or is settled; none is forgotten, whoever dies."""

    def __init__(self, requests: Iterable[PromptRequest], expected: int, workers: int) -> None:
        """`expected`: about how many requests there are, on which the last chunks' lengths depend, and nothing else."""
        self._source = iter(requests)
        self._expected, self._workers = expected, max(1, workers)
        self._ended = False
        self._held: dict[int, dict[Key, PromptRequest]] = {}
        self._strikes: Counter[Key] = Counter()
        self._again: deque[Chunk] = deque()

    def prime(self) -> None:
        """Have the first row ready, which may take minutes."""
        self._source = primed(self._source)

    @property
    def over(self) -> bool:
        """Whether every row is settled."""
        return self._ended and not self._again and not any(self._held.values())

    def stream(self, worker: int, loading: int = 0) -> Chunk | None:
        """The next rows for a worker that renders one stream of rows; None where there are no more for it.

        While so many others are `loading` their model, it has no more rows at once than its share.
        """
        number = max(1, min(CHUNK, -(-self._expected // (2 * self._workers))))
        if loading and self._expected > 0:
            held = sum(map(len, self._held.values()))
            share = -(-(self._expected + held) // self._workers)
            number = min(number, share - len(self._held.get(worker, ())))
            if number <= 0:
                return None
        requests = tuple(islice(self._source, number))
        self._ended = self._ended or not requests
        self._expected -= len(requests)
        return self._hand(worker, Chunk(requests)) if requests else None

    def apart(self, worker: int) -> Chunk | None:
        """Rows that another worker has died with."""
        return self._hand(worker, self._again.popleft()) if self._again else None

    def _hand(self, worker: int, chunk: Chunk) -> Chunk:
        self._held.setdefault(worker, {}).update((request.key, request) for request in chunk.requests)
        return chunk

    def settle(self, keys: Iterable[Key]) -> set[Key]:
        """These rows are committed, by whoever it was; gives those that were not so before."""
        new = set()
        for key in keys:
            for held in self._held.values():
                if held.pop(key, None) is not None:
                    new.add(key)
        return new

    def take_back(self, worker: int) -> None:
        """A worker has ended in order: what it had not rendered waits for another, and nothing is held against it."""
        rows = tuple(self._held.pop(worker, {}).values())
        self._again.extend(Chunk(rows[k : k + APART], apart=True) for k in range(0, len(rows), APART))

    def give_up(self, worker: int) -> list[PromptRequest]:
        """A worker has died: its rows will be tried again, in smaller company. Gives those that have now failed."""
        failed: list[PromptRequest] = []
        company: list[PromptRequest] = []
        alone: list[PromptRequest] = []
        for key, request in self._held.pop(worker, {}).items():
            self._strikes[key] += 1
            strikes = self._strikes[key]
            (company if strikes == 1 else alone if strikes < STRIKES else failed).append(request)
        self._again.extend(Chunk(tuple(company[k : k + APART]), apart=True) for k in range(0, len(company), APART))
        self._again.extend(Chunk((request,), apart=True) for request in alone)
        return failed
