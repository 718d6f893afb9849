"""Progress on stderr: one bar on a terminal, lines of the log otherwise."""

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
"""Seconds between two lines."""


def make_progress(*, shown: bool) -> ProgressBar | ProgressLog | ProgressGroup:
    """The progress for where stderr goes to."""
    if not shown:
        return ProgressGroup()
    return ProgressBar() if sys.stderr.isatty() and not is_json() else ProgressLog()


class ProgressGroup:
    """Several that are told how a run goes, or nobody."""

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


class ProgressBar:
    """tqdm's bar: results, images a second, time left, flagged and failed."""

    def __init__(self) -> None:
        self._tally = ProgressCounts()
        self._bar: tqdm[Any] | None = None

    def start(self, survey: ScanResult) -> None:
        self._tally.start(survey)
        _log_start(survey)
        if survey.pending:
            self._bar = tqdm(
                total=survey.total,
                initial=self._tally.done,
                unit="image",
                dynamic_ncols=True,
                # The rate and the time left are the tally's: tqdm's count from here, where the model is yet to load.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
                postfix=LOADING,
            )

    def ready(self, throughput: Throughput) -> None:
        self._tally.throughput = throughput
        if self._bar is not None:
            self._bar.set_postfix_str(str(self._tally))

    def committed(self, rows: Sequence[ResultRow]) -> None:
        self._tally.add(rows)
        if self._bar is not None:
            self._bar.set_postfix_str(str(self._tally), refresh=False)
            self._bar.update(len(rows))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class ProgressLog:
    """A line every few seconds, and one at the end, for a log file."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._tally = ProgressCounts()
        self._clock = clock
        self._written_at = 0.0
        self._is_written = True

    def start(self, survey: ScanResult) -> None:
        self._tally.start(survey)
        self._written_at = self._clock()
        _log_start(survey)
        if survey.pending:
            log.info(LOADING)

    def ready(self, throughput: Throughput) -> None:
        self._tally.throughput = throughput
        log.info("model loaded, rendering")

    def committed(self, rows: Sequence[ResultRow]) -> None:
        self._tally.add(rows)
        self._is_written = False
        if self._clock() - self._written_at >= LINE_EVERY:
            self._write()

    def close(self) -> None:
        if not self._is_written:
            self._write()

    def _write(self) -> None:
        self._written_at, self._is_written = self._clock(), True
        tally = self._tally
        fields = {
            "done": tally.done,
            "total": tally.total,
            "images_per_second": tally.images_per_second,
            "seconds_left": tally.seconds_left,
        }
        log.info("%d of %d, %s", tally.done, tally.total, tally, extra=fields)


def _log_start(survey: ScanResult) -> None:
    why = f": {survey.explanation};" if survey.explanation else ","
    counts = {"pending": survey.pending, "done": survey.done, "invalid": survey.invalid}
    more = {"reasons": survey.reasons, "changes": survey.changes}
    log.info(
        "%d to render%s %d done before, %d invalid", survey.pending, why, survey.done, survey.invalid,
        extra={**counts, **more},
    )  # fmt: skip


class ProgressCounts:
    """Counts of results, and the speed."""

    def __init__(self) -> None:
        self.total = self.done = self.flagged = self.failed = self.invalid = 0
        self.throughput: Throughput | None = None

    def start(self, survey: ScanResult) -> None:
        self.total, self.done, self.invalid = survey.total, survey.done + survey.invalid, survey.invalid
        self.throughput = None

    def add(self, rows: Sequence[ResultRow]) -> None:
        self.done += len(rows)
        self.flagged += sum(row.status == "flagged" for row in rows)
        self.failed += sum(row.status == "failed" for row in rows)
        self.invalid += sum(row.status == "invalid" for row in rows)

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
