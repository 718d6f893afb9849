"""Progress on stderr: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from batch_infer.cli.logs import is_json, log

if TYPE_CHECKING:
    from batch_infer.jobs import Progress, ScanResult, Throughput
    from batch_infer.records import ResultRow

LOADING = "loading model"
LINE_EVERY = 10.0
"""Seconds between two log lines."""


def shows_bar() -> bool:
    """Return whether stderr is a terminal on which a bar can be drawn."""
    return sys.stderr.isatty() and not is_json()


def make_progress(*, shown: bool) -> Progress:
    """Return the progress for stderr, or one that shows nothing."""
    if not shown:
        return ProgressGroup()
    return ProgressBar() if shows_bar() else ProgressLog()


class ProgressGroup:
    """Passes every call on to several listeners, or to none."""

    def __init__(self, *listeners: Progress) -> None:
        self._listeners = listeners

    def start(self, survey: ScanResult) -> None:
        for listener in self._listeners:
            listener.start(survey)

    def ready(self, throughput: Throughput) -> None:
        for listener in self._listeners:
            listener.ready(throughput)

    def committed(self, rows: Sequence[ResultRow]) -> None:
        for listener in self._listeners:
            listener.committed(rows)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()


class ProgressCounts:
    """Counts of results, and their rate as soon as there is one."""

    def __init__(self) -> None:
        self.total = self.done = self.flagged = self.failed = self.invalid = 0
        self.throughput: Throughput | None = None

    def start(self, survey: ScanResult) -> None:
        """Count and log the results of a scan."""
        self.total, self.done, self.invalid = survey.total, survey.done + survey.invalid, survey.invalid
        self.throughput = None
        reasons = f": {survey.explanation};" if survey.explanation else ","
        fields = {name: getattr(survey, name) for name in ("pending", "done", "invalid", "reasons", "changes")}
        counts = survey.pending, reasons, survey.done, survey.invalid
        log.info("%d to render%s %d done before, %d invalid", *counts, extra=fields)

    def committed(self, rows: Sequence[ResultRow]) -> None:
        statuses = [row.status for row in rows]
        self.done += len(rows)
        self.flagged += statuses.count("flagged")
        self.failed += statuses.count("failed")
        self.invalid += statuses.count("invalid")

    @property
    def images_per_second(self) -> float | None:
        return self.throughput.images_per_second if self.throughput else None

    @property
    def seconds_left(self) -> float | None:
        return self.throughput.seconds_for(self.total - self.done) if self.throughput else None

    def __str__(self) -> str:
        parts = []
        if (rate := self.images_per_second) is not None:
            parts.append(f"{rate:.2f} images/s")
        if self.done < self.total and (seconds := self.seconds_left) is not None:
            parts.append(f"{tqdm.format_interval(seconds)} left")
        parts += [f"{self.flagged} flagged", f"{self.failed} failed"]
        return ", ".join(parts + [f"{self.invalid} invalid"] * bool(self.invalid))


class ProgressBar:
    """A tqdm bar with images per second, the time left, and flagged, failed and invalid results."""

    def __init__(self) -> None:
        self._counts = ProgressCounts()
        self._bar: tqdm[Any] | None = None

    def start(self, survey: ScanResult) -> None:
        self._counts.start(survey)
        if survey.pending:
            self._bar = tqdm(
                total=survey.total,
                initial=self._counts.done,
                unit="image",
                dynamic_ncols=True,
                # tqdm's own rate and time left would count from here, before the model is loaded.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
                postfix=LOADING,
            )

    def ready(self, throughput: Throughput) -> None:
        self._counts.throughput = throughput
        if self._bar is not None:
            self._bar.set_postfix_str(str(self._counts))

    def committed(self, rows: Sequence[ResultRow]) -> None:
        self._counts.committed(rows)
        if self._bar is not None:
            self._bar.set_postfix_str(str(self._counts), refresh=False)
            self._bar.update(len(rows))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class ProgressLog:
    """A log line every LINE_EVERY seconds, and one at the end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._counts = ProgressCounts()
        self._clock = clock
        self._written_at = 0.0
        self._is_written = True

    def start(self, survey: ScanResult) -> None:
        self._counts.start(survey)
        self._written_at = self._clock()
        if survey.pending:
            log.info(LOADING)

    def ready(self, throughput: Throughput) -> None:
        self._counts.throughput = throughput
        log.info("model loaded, rendering")

    def committed(self, rows: Sequence[ResultRow]) -> None:
        self._counts.committed(rows)
        self._is_written = False
        if self._clock() - self._written_at >= LINE_EVERY:
            self._write()

    def close(self) -> None:
        if not self._is_written:
            self._write()

    def _write(self) -> None:
        self._written_at, self._is_written = self._clock(), True
        counts = self._counts
        fields = {name: getattr(counts, name) for name in ("done", "total", "images_per_second", "seconds_left")}
        log.info("%d of %d, %s", counts.done, counts.total, counts, extra=fields)
