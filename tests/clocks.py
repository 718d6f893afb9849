"""A clock for tests that advances only on demand, so that no result depends on the speed of the machine."""

from __future__ import annotations

import threading


class Clock:
    """Replaces the module `time` in the module under test. `now` is in seconds and starts at 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Advance the clock and return immediately."""
        with self._lock:
            self.now += seconds
