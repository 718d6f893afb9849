"""Progress on stderr: one bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from batch_infer.jobs.survey import Survey
    from batch_infer.records import ResultRow

LINE_EVERY = 10.0
"""Seconds between two lines."""

log = logging.getLogger("batch_infer")


class _Handler(logging.Handler):
    """Log lines above the bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    """Send the package's log to stderr: warnings and more, with -v everything, with -q only errors."""
    handler = _Handler()
    handler.setFormatter(logging.Formatter("batch-infer: %(message)s"))
    handler.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    log.handlers = [handler]
    log.setLevel(logging.DEBUG)
    log.propagate = False


def make_progress(*, shown: bool) -> Bar | Lines | Silent:
    """The progress for where stderr goes to."""
    if not shown:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()


class Silent:
    """No progress."""

    def start(self, survey: Survey) -> None:
        pass

    def committed(self, rows: Sequence[ResultRow]) -> None:
        pass

    def close(self) -> None:
        pass


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
        log.info("%d to render, %d done before, %d invalid", survey.pending, survey.done, survey.invalid)

    def committed(self, rows: Sequence[ResultRow]) -> None:
        self._tally.add(rows)
        self._here += len(rows)
        now = time.monotonic()
        if now - self._told < LINE_EVERY:
            return
        self._told = now
        rate = self._here / (now - self._started)
        left = tqdm.format_interval((self._total - self._done - self._here) / rate)
        log.info("%d of %d, %.2f images/s, %s left, %s", self._done + self._here, self._total, rate, left, self._tally)

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
