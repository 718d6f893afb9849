"""Report the progress of a run to listeners, and in run.json to `status`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from batch_infer.engines import TaskReport
from batch_infer.errors import StorageError
from batch_infer.jobs.run_folder import RunFolder
from batch_infer.jobs.scan import ScanResult
from batch_infer.jobs.summary import Summary, Throughput
from batch_infer.records import ResultRow

INTERVAL = 30.0
"""Minimum number of seconds between two updates of run.json, each of which is a write to an object store."""
COUNTS = ("truncated", "first_truncated", "reasons")
"""Counts that are recorded. The manifest has the others."""


class Progress(Protocol):
    """Receives the events of a run."""

    def start(self, scan: ScanResult) -> None:
        """Called before the pending rows are rendered. Not called if there are none."""
        ...

    def ready(self, throughput: Throughput) -> None:
        """Called when the first worker is ready. `throughput` is updated before each call of `committed`."""
        ...

    def committed(self, rows: Sequence[ResultRow]) -> None: ...
    def close(self) -> None: ...


class LiveFigures:
    """Keeps the figures of an active run in run.json, under `progress`. The next run and the summary replace them."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._summary = folder, Summary()
        self._throughput: Throughput | None = None
        self._written_at = 0.0

    def start(self, throughput: Throughput) -> None:
        """Begin when the first worker is ready."""
        self._summary, self._throughput, self._written_at = Summary(), throughput, time.monotonic()

    def add(self, rows: Sequence[ResultRow]) -> None:
        """Count committed rows."""
        for row in rows:
            self._summary.counts.add_row(row)

    def report(self, report: TaskReport) -> None:
        """Write the figures if those in run.json are old, or if another worker has died."""
        has_new_deaths = report.deaths > self._summary.deaths
        if self._throughput is None or not (has_new_deaths or time.monotonic() - self._written_at >= INTERVAL):
            return
        self._written_at = time.monotonic()
        self._summary.set_speed(self._throughput)
        self._summary.add(report)
        others = self._summary.counts.as_dict().keys() - COUNTS
        figures = {key: value for key, value in self._summary.as_dict().items() if key not in others}
        with suppress(StorageError):  # the results do not depend on it
            self._folder.update_record(progress=figures)
