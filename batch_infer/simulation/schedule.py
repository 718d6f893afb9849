"""Which mini-batch is delivered next, and which deliveries end with a simulated kill."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from batch_infer.simulation.mini_batches import MiniBatch
from batch_infer.simulation.settings import SimulationOutcome

FIRST_KILL_SECONDS = 0.1
"""Latest time of a kill while it is not known how long a mini-batch takes."""


@dataclass(slots=True)
class _Progress:
    """The state of a mini-batch. `open`: deliveries that wait or run. `rows`: returned by its first successful run."""

    failed_tries: int = 0
    deliveries: int = 0
    open: int = 1
    rows: int | None = None


class DeliveryQueue:
    """Hands out mini-batches until each has succeeded, or has failed and used up its retries.

    Counts what happens in `outcome`.
    """

    def __init__(self, mini_batches: Sequence[MiniBatch], max_retries: int, outcome: SimulationOutcome) -> None:
        self._mini_batches, self._max_retries, self._outcome = mini_batches, max_retries, outcome
        self._waiting = deque(mini_batches)
        self._progress = [_Progress() for _ in mini_batches]

    def duplicate(self, share: float, rng: random.Random) -> None:
        """Deliver this share twice; half of them in direct succession, so that two workers run them at once."""
        for mini_batch in rng.sample(list(self._mini_batches), round(share * len(self._mini_batches))):
            first = self._waiting.index(mini_batch)
            self._waiting.insert(rng.choice([first + 1, rng.randint(first + 1, len(self._waiting))]), mini_batch)
            self._progress[mini_batch.index].open += 1
            self._outcome.duplicates += 1

    @property
    def is_finished(self) -> bool:
        """Whether no delivery waits or runs."""
        return not any(progress.open for progress in self._progress)

    @property
    def head(self) -> MiniBatch | None:
        """The mini-batch that `take` returns next."""
        return self._waiting[0] if self._waiting else None

    def take(self) -> MiniBatch:
        return self._waiting.popleft()

    def record_delivery(self, mini_batch: MiniBatch) -> None:
        self._progress[mini_batch.index].deliveries += 1
        self._outcome.deliveries += 1

    def is_new(self, mini_batch: MiniBatch) -> bool:
        """Return whether it has not been delivered yet."""
        return not self._progress[mini_batch.index].deliveries

    def has_succeeded(self, mini_batch: MiniBatch) -> bool:
        return self._progress[mini_batch.index].rows is not None

    def record_success(self, mini_batch: MiniBatch, rows: int) -> None:
        """Count a run that returned. One that returned no row has failed, and is not retried."""
        progress = self._progress[mini_batch.index]
        progress.open -= 1
        self._outcome.rows += rows
        if progress.rows is None:
            progress.rows = rows
            self._outcome.succeeded += bool(rows)
            self._outcome.failed += not rows
            self._outcome.failed_files += max(0, len(mini_batch.files) - rows)

    def record_failure(self, mini_batch: MiniBatch) -> bool:
        """Count a failed run, and return whether the caller must deliver it again, at once or by `put_back`."""
        progress = self._progress[mini_batch.index]
        progress.failed_tries += 1
        if progress.rows is None and progress.failed_tries <= self._max_retries:
            self._outcome.retries += 1
            return True
        progress.open -= 1
        if progress.rows is None and not progress.open:
            self._outcome.failed += 1
            self._outcome.failed_files += len(mini_batch.files)
        return False

    def put_back(self, mini_batch: MiniBatch) -> None:
        """Queue it again for any worker."""
        self._waiting.append(mini_batch)

    def describe_try(self, mini_batch: MiniBatch) -> str:
        """Return which of its tries has failed."""
        return f"try {self._progress[mini_batch.index].failed_tries} of {self._max_retries + 1}"


class KillSchedule:
    """Kills of a share of mini-batches, each once, at a random moment within the time that others have taken.

    A kill that comes after its mini-batch has ended has missed, and is assigned to another one.
    """

    def __init__(self, share: float, mini_batches: int, rng: random.Random) -> None:
        self.remaining = round(share * mini_batches)
        """Kills that have not been assigned to a delivery."""
        self._new_count, self._rng = mini_batches, rng
        self._killed: set[int] = set()
        self._seconds_per_file: list[float] = []

    def must_wait(self, *, is_measuring: bool) -> bool:
        """Return whether to hold back new mini-batches: all must be killed, and it is not known how long they take.

        `is_measuring`: a mini-batch that will not be killed is running.
        """
        return is_measuring and not self._seconds_per_file and 0 < self._new_count <= self.remaining

    def assign(self, mini_batch: MiniBatch, *, is_new: bool) -> float | None:
        """Return after how many seconds to kill the worker that runs this delivery, or None."""
        new_count = self._new_count
        if is_new:
            self._new_count -= 1
        if not self.remaining or mini_batch.index in self._killed:
            return None
        is_known = bool(self._seconds_per_file)
        # Retries and duplicates are killed only once no new mini-batch is left for the remaining kills.
        chance = self.remaining / new_count if is_new else float(not new_count)
        if (not is_known and self.remaining < new_count) or self._rng.random() >= chance:
            return None
        self.remaining -= 1
        seconds = FIRST_KILL_SECONDS
        if is_known:
            seconds = self._rng.choice(self._seconds_per_file) * len(mini_batch.files)
        return self._rng.random() * seconds

    def record_duration(self, mini_batch: MiniBatch, seconds: float) -> None:
        self._seconds_per_file.append(seconds / len(mini_batch.files))

    def record_hit(self, mini_batch: MiniBatch) -> None:
        self._killed.add(mini_batch.index)

    def record_miss(self) -> None:
        self.remaining += 1
