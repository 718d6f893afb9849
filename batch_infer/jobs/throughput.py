"""The speed of a run, by one definition for its progress, its metrics, its summary and `status`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from batch_infer.records import ResultRow


class Throughput:
    """Images rendered from when the first worker was ready until the latest commit, divided by the time between.

    An image counts once it is committed, unless it failed or was blocked. The time in which the model loads does not
    count. Create it when the first worker is ready.

    Rows that are rendered together finish together, and their results come one by one: until `in_flight` results are
    committed, as many as are under way at a time, a rate would count the time of all of them for a few.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, in_flight: int = 1) -> None:
        self._clock, self._in_flight = clock, in_flight
        self._ready_at = self._latest = clock()
        self.committed = 0
        self.rendered = 0

    def add(self, rows: Sequence[ResultRow]) -> None:
        self.committed += len(rows)
        self.rendered += sum(row.status in ("ok", "flagged") for row in rows)
        self._latest = self._clock()

    @property
    def seconds(self) -> float:
        """Seconds from the first worker's readiness to the latest commit."""
        return self._latest - self._ready_at

    @property
    def images_per_second(self) -> float | None:
        """None until an image is committed, and `in_flight` results."""
        return self.rendered / self.seconds if self._is_settled and self.rendered and self.seconds else None

    def seconds_for(self, results: int) -> float | None:
        """Return the seconds that so many more results take at this speed; None until `in_flight` are committed."""
        return results * self.seconds / self.committed if self._is_settled else None

    @property
    def _is_settled(self) -> bool:
        return self.committed >= max(1, self._in_flight)
