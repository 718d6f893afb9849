"""Record which worker has which rows, and retry the rows of workers that died."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

from batch_infer.records import PromptRequest

CHUNK_ROWS = 32
"""Maximum number of rows in a chunk. The last chunks are shorter, so that all workers finish at about the same time."""
RETRY_ROWS = 16
"""Maximum number of rows that are retried together after one worker ended or became idle without committing them."""
MAX_DEATHS = 3
"""A row fails after this many workers died or became idle without committing it, the last one with no other row."""

Key = tuple[str, int]
Item = TypeVar("Item")


def prefetch_first(items: Iterable[Item]) -> Iterator[Item]:
    """Fetch the first item now, and return an iterator over all items.

    The first request of a run may take minutes, since sorting the requests reads all tables.
    """
    source = iter(items)
    return chain(list(islice(source, 1)), source)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows for a worker. An isolated chunk is rendered and committed before the worker gets another."""

    requests: tuple[PromptRequest, ...]
    is_isolated: bool = False


class Ledger:
    """Hands out rows. Each row is unassigned, assigned to one worker, waiting to be retried, committed, or failed."""

    def __init__(self, requests: Iterable[PromptRequest], expected: int, workers: int) -> None:
        """`expected` is the approximate number of requests. It only affects how rows are divided among workers."""
        self._source = iter(requests)
        self._expected, self._workers = expected, max(1, workers)
        self._source_ended = False
        self._assigned: dict[int, dict[Key, PromptRequest]] = {}
        self._deaths: Counter[Key] = Counter()
        self._retries: deque[Chunk] = deque()

    def prefetch(self) -> None:
        """Fetch the first row, which may take minutes."""
        self._source = prefetch_first(self._source)

    @property
    def is_done(self) -> bool:
        """Whether every row is committed or has failed, and `next_chunk` has found no more rows."""
        return self._source_ended and not self._retries and not any(self._assigned.values())

    def next_chunk(self, worker: int, loading: int = 0) -> Chunk | None:
        """Return the next rows for a worker, or None if there are none for it now.

        While other workers load the model (`loading` of them), a worker gets at most its share of uncommitted rows.
        """
        count = max(1, min(CHUNK_ROWS, -(-self._expected // (2 * self._workers))))
        if loading and self._expected > 0:
            share = -(-(self._expected + sum(map(len, self._assigned.values()))) // self._workers)
            count = min(count, share - len(self._assigned.get(worker, ())))
            if count <= 0:
                return None
        requests = tuple(islice(self._source, count))
        self._source_ended = self._source_ended or not requests
        self._expected -= len(requests)
        return self._assign(worker, Chunk(requests)) if requests else None

    def next_retry(self, worker: int) -> Chunk | None:
        """Return rows to retry, or None if there are none."""
        return self._assign(worker, self._retries.popleft()) if self._retries else None

    def _assign(self, worker: int, chunk: Chunk) -> Chunk:
        self._assigned.setdefault(worker, {}).update((request.key, request) for request in chunk.requests)
        return chunk

    def commit(self, keys: Iterable[Key]) -> set[Key]:
        """Record that rows are committed, by any worker. Return the keys that were still assigned to a worker."""
        new_keys = set()
        for key in keys:
            for requests in self._assigned.values():
                if requests.pop(key, None) is not None:
                    new_keys.add(key)
        return new_keys

    def release(self, worker: int) -> None:
        """Let other workers render the remaining rows of a worker that ended normally."""
        self._retry(list(self._assigned.pop(worker, {}).values()), RETRY_ROWS)

    def record_death(self, worker: int) -> list[PromptRequest]:
        """Split the rows of a worker that died, or became idle without committing them, into small chunks to retry.

        Return the rows that have now failed.
        """
        requests = list(self._assigned.pop(worker, {}).values())
        self._deaths.update(request.key for request in requests)
        self._retry([request for request in requests if self._deaths[request.key] == 1], RETRY_ROWS)
        self._retry([request for request in requests if 1 < self._deaths[request.key] < MAX_DEATHS], 1)
        return [request for request in requests if self._deaths[request.key] == MAX_DEATHS]

    def _retry(self, requests: Sequence[PromptRequest], size: int) -> None:
        chunks = (requests[start : start + size] for start in range(0, len(requests), size))
        self._retries.extend(Chunk(tuple(chunk), is_isolated=True) for chunk in chunks)
