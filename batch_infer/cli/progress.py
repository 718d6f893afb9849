"""Progress on stderr: one bar on a terminal, lines of the log otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from batch_infer.cli.logs import in_json, log

if TYPE_CHECKING:
    from batch_infer.jobs.run import Progress
    from batch_infer.jobs.survey import Survey
    from batch_infer.records import ResultRow

LINE_EVERY = 10.0
"""Seconds between two lines."""


def make_progress(*, shown: bool) -> Bar | Lines | Together:
    """The progress for where stderr goes to."""
    if not shown:
        return Together()
    return Bar() if sys.stderr.isatty() and not in_json() else Lines()


class Together:
    """Several that are told how a run goes, or nobody."""

    def __init__(self, *listeners: Progress) -> None:
        self._listeners = listeners

    def start(self, survey: Survey) -> None:
        for listener in self._listeners:
            listener.start(survey)

    def committed(self, rows: Sequence[ResultRow]) -> None:
        for listener in self._listeners:
            listener.committed(rows)

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()


class Bar:
    """tqdm's bar: rows, images a second, time left, flagged and failed."""

    def __init__(self) -> None:
        self._tally = _Tally()
        self._bar: tqdm[Any] | None = None

    def start(self, survey: Survey) -> None:
        self._tally.invalid = survey.invalid
        if survey.pending:
            self._bar = tqdm(total=survey.total, initial=survey.done + survey.invalid, unit="image", dynamic_ncols=True)

    def committed(self, rows: Sequence[ResultRow]) -> None:
        self._tally.add(rows)
        if self._bar is not None:
            self._bar.set_postfix_str(str(self._tally), refresh=False)
            self._bar.update(len(rows))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Lines:
    """A line every few seconds, for a log file."""

    def __init__(self) -> None:
        self._tally = _Tally()
        self._total = self._done = self._here = 0
        self._started = self._told = 0.0

    def start(self, survey: Survey) -> None:
        self._total, self._done = survey.total, survey.done + survey.invalid
        self._tally.invalid = survey.invalid
        self._started = self._told = time.monotonic()
        counts = {"pending": survey.pending, "done": survey.done, "invalid": survey.invalid}
        log.info("%(pending)d to render, %(done)d done before, %(invalid)d invalid", counts, extra=counts)

    def committed(self, rows: Sequence[ResultRow]) -> None:
        self._tally.add(rows)
        self._here += len(rows)
        now = time.monotonic()
        if now - self._told < LINE_EVERY:
            return
        self._told = now
        rate, done = self._here / (now - self._started), self._done + self._here
        seconds = (self._total - done) / rate
        log.info(
            *("%d of %d, %.2f images/s, %s left, %s", done, self._total, rate),
            *(tqdm.format_interval(seconds), self._tally),
            extra={"done": done, "total": self._total, "images_per_second": rate, "seconds_left": seconds},
        )

    def close(self) -> None:
        pass


class _Tally:
    """How many images are flagged, failed and invalid."""

    def __init__(self) -> None:
        self.flagged = self.failed = self.invalid = 0

    def add(self, rows: Sequence[ResultRow]) -> None:
        self.flagged += sum(row.status == "flagged" for row in rows)
        self.failed += sum(row.status == "failed" for row in rows)
        self.invalid += sum(row.status == "invalid" for row in rows)

    def __str__(self) -> str:
        told = f"{self.flagged} flagged, {self.failed} failed"
        return f"{told}, {self.invalid} invalid" if self.invalid else told
