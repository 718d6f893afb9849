"""A clock for tests: its time passes only where something says so, so that no result depends on the machine's speed."""

from __future__ import annotations

import threading


class Clock:
    """Stands in for the module `time` in the module under test; `now` is in seconds and starts at 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Move the clock on; return at once."""
        with self._lock:
            self.now += seconds
