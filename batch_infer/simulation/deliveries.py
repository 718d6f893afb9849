"""Which mini-batches are to be delivered: first, again after a failure, or a second time without one."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from batch_infer.simulation.messages import MiniBatch


@dataclass(slots=True)
class Fate:
    """What has come of one mini-batch."""

    tries_failed: int = 0
    deliveries: int = 0
    open: int = 1
    """How many deliveries wait or are under way."""
    rows: int | None = None
    """How many its first run that went well has returned."""


class Deliveries:
    """Hands out mini-batches until each is settled: it has succeeded, or failed once more than it may be retried."""

    def __init__(self, mini_batches: Sequence[MiniBatch], max_retries: int) -> None:
        self._mini_batches, self._max_retries = mini_batches, max_retries
        self._waiting = deque(mini_batches)
        self._fates = [Fate() for _ in mini_batches]
        self._open = len(mini_batches)
        self.counts: Counter[str] = Counter()
        """By the names of an outcome's."""

    def duplicate(self, share: float, draw: random.Random) -> None:
        """Have that share delivered twice; half of them with nothing in between, so that two workers run it at once."""
        for mini_batch in draw.sample(list(self._mini_batches), round(share * len(self._mini_batches))):
            first = self._waiting.index(mini_batch)
            self._waiting.insert(draw.choice([first + 1, draw.randint(first + 1, len(self._waiting))]), mini_batch)
            self._add(mini_batch, 1)
            self.counts["duplicates"] += 1

    def _add(self, mini_batch: MiniBatch, deliveries: int) -> None:
        self._fates[mini_batch.index].open += deliveries
        self._open += deliveries

    @property
    def over(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self._open

    @property
    def head(self) -> MiniBatch | None:
        """The one that is handed out next."""
        return self._waiting[0] if self._waiting else None

    def take(self) -> MiniBatch:
        """Hand out the head."""
        return self._waiting.popleft()

    def note_delivery(self, mini_batch: MiniBatch) -> None:
        """A worker is given it."""
        self._fates[mini_batch.index].deliveries += 1
        self.counts["deliveries"] += 1

    def is_first(self, mini_batch: MiniBatch) -> bool:
        """Whether it has not been delivered yet."""
        return not self._fates[mini_batch.index].deliveries

    def is_done(self, mini_batch: MiniBatch) -> bool:
        """Whether it has succeeded."""
        return self._fates[mini_batch.index].rows is not None

    def returned(self, mini_batch: MiniBatch, rows: int) -> None:
        """A run went well. One that returned nothing is not tried again, and is no success."""
        fate = self._fates[mini_batch.index]
        self._add(mini_batch, -1)
        self.counts["rows"] += rows
        if fate.rows is None:
            fate.rows = rows
            self.counts["succeeded" if rows else "failed"] += 1
            self.counts["failed_files"] += max(0, len(mini_batch.files) - rows)

    def failed(self, mini_batch: MiniBatch) -> bool:
        """A run failed. Whether it is to be tried again; that then counts as open, and is handed out by the caller."""
        fate = self._fates[mini_batch.index]
        fate.tries_failed += 1
        if fate.rows is None and fate.tries_failed <= self._max_retries:
            self.counts["retries"] += 1
            return True
        self._add(mini_batch, -1)
        if fate.rows is None and not fate.open:
            self.counts["failed"] += 1
            self.counts["failed_files"] += len(mini_batch.files)
        return False

    def put_back(self, mini_batch: MiniBatch) -> None:
        """Have whoever comes try it again."""
        self._waiting.append(mini_batch)

    def told_try(self, mini_batch: MiniBatch) -> str:
        """Which of its tries has failed, after `failed`."""
        return f"try {self._fates[mini_batch.index].tries_failed} of {self._max_retries + 1}"
