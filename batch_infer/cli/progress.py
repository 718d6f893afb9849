"""Show progress on stderr: a bar on a terminal if the log is text, otherwise log lines."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from tqdm import TqdmWarning, tqdm

from batch_infer.cli.logs import is_json, log
from batch_infer.cli.report import format_duration, format_rate

if TYPE_CHECKING:
    from batch_infer.jobs import Progress, ScanResult, Throughput
    from batch_infer.records import ResultRow

LOADING = "loading model"
LOG_INTERVAL = 10.0
"""Minimum number of seconds between log lines of progress, except before the last."""
FIRST_WAIT = 30.0
"""Seconds without a result after which the log says that it is waiting."""
WAITING = "waiting for the first result"
"""Name of the thread that logs this."""


def shows_bar() -> bool:
    """Return whether to draw a progress bar: stderr is a terminal and the log is not JSON."""
    return sys.stderr.isatty() and not is_json()


def make_progress(*, shown: bool) -> Progress:
    """If `shown`, return a progress bar or log (see shows_bar), otherwise an object that shows nothing."""
    if not shown:
        return ProgressGroup()
    return ProgressBar() if shows_bar() else ProgressLog()


def find_bar_type() -> type[tqdm[Any]]:
    """Return the bar of tqdm.auto: a widget in Jupyter if ipywidgets is installed, otherwise text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # which recommends ipywidgets
        from tqdm.auto import tqdm as auto_tqdm
    return auto_tqdm


class CheckProgress:
    """Shows how many items a command has checked: as a bar on a terminal, otherwise as log lines."""

    def __init__(self, noun: str, verb: str, *, shown: bool, bar_type: type[tqdm[Any]] | None = None) -> None:
        """`noun` names an item, and `verb` says what was done with it: `image`, `checked`.

        With `bar_type`, show a bar of this type even if stderr is not a terminal.
        """
        self._noun, self._verb, self._shown, self._logged_at = noun, verb, shown, time.monotonic()
        self._bar_type = bar_type or (tqdm if shows_bar() else None)
        self._bar: tqdm[Any] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` items are checked."""
        if not self._shown:
            return
        if self._bar_type is not None:
            self._bar = self._bar or self._bar_type(total=total, unit=f" {self._noun}s", dynamic_ncols=True)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._logged_at >= LOG_INTERVAL:
            self._logged_at = time.monotonic()
            log.info("%d of %d %ss %s", done, total, self._noun, self._verb, extra={"done": done, "total": total})

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class ProgressGroup:
    """Passes every call to all listeners. Without listeners, it shows nothing."""

    def __init__(self, *listeners: Progress) -> None:
        self._listeners = listeners

    def start(self, scan: ScanResult) -> None:
        for listener in self._listeners:
            listener.start(scan)

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
    """Counts results and logs how many remain to be rendered. ProgressBar and ProgressLog also show the counts."""

    def __init__(self) -> None:
        self.total = self.done = self.flagged = self.failed = self.invalid = 0
        self._throughput: Throughput | None = None

    def start(self, scan: ScanResult) -> None:
        self.total, self.done, self.invalid = scan.total, scan.finished + scan.invalid, scan.invalid
        self._throughput = None
        reasons = f": {scan.explanation};" if scan.explanation else ","
        invalid = f", {scan.invalid} invalid" if scan.invalid else ""
        fields = {name: getattr(scan, name) for name in ("pending", "invalid", "reasons", "changes")}
        counts = scan.pending, reasons, scan.finished, invalid
        log.info("%d to render%s %d already done%s", *counts, extra={**fields, "done": scan.finished})

    def ready(self, throughput: Throughput) -> None:
        self._throughput = throughput

    def committed(self, rows: Sequence[ResultRow]) -> None:
        statuses = [row.status for row in rows]
        self.done += len(rows)
        self.flagged += statuses.count("flagged")
        self.failed += statuses.count("failed")
        self.invalid += statuses.count("invalid")

    @property
    def images_per_second(self) -> float | None:
        return self._throughput.images_per_second if self._throughput else None

    @property
    def seconds_left(self) -> float | None:
        return self._throughput.estimate_seconds(self.total - self.done) if self._throughput else None

    def __str__(self) -> str:
        parts = []
        if (rate := self.images_per_second) is not None:
            parts.append(format_rate(rate))
        if self.done < self.total and (seconds := self.seconds_left) is not None:
            parts.append(f"{tqdm.format_interval(seconds)} left")
        parts += [f"{self.flagged} flagged", f"{self.failed} failed"]
        return ", ".join(parts + [f"{self.invalid} invalid"] * bool(self.invalid))


class ProgressBar(ProgressCounts):
    """Shows a tqdm bar with images per second, the remaining time, and flagged, failed and invalid results."""

    _bar: tqdm[Any] | None = None

    def __init__(self, bar_type: type[tqdm[Any]] = tqdm) -> None:
        super().__init__()
        self._bar_type = bar_type

    def start(self, scan: ScanResult) -> None:
        super().start(scan)
        if scan.pending:
            # Leave out tqdm's own rate and remaining time: they would include loading the model.
            layout = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = self._bar_type(
                total=self.total, initial=self.done, dynamic_ncols=True, bar_format=layout, postfix=LOADING
            )

    def ready(self, throughput: Throughput) -> None:
        super().ready(throughput)
        if self._bar is not None:
            self._bar.set_postfix_str(str(self))

    def committed(self, rows: Sequence[ResultRow]) -> None:
        super().committed(rows)
        if self._bar is not None:
            self._bar.set_postfix_str(str(self), refresh=False)
            self._bar.update(len(rows))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class ProgressLog(ProgressCounts):
    """Logs counts of committed results at most once per LOG_INTERVAL, and at the end those not logged yet.

    Until the first result, it also logs that it is waiting: after FIRST_WAIT seconds, then at twice the wait.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._logged_at, self._has_unlogged = clock, 0.0, False
        self._has_results = Event()

    def start(self, scan: ScanResult) -> None:
        super().start(scan)
        self._logged_at = self._clock()
        if scan.pending:
            log.info(LOADING)

    def ready(self, throughput: Throughput) -> None:
        super().ready(throughput)
        log.info("model loaded, rendering")
        self._has_results.set()  # rendering begins again if compilation failed
        self._has_results = Event()
        Thread(target=self._log_waiting, args=[self._has_results], name=WAITING, daemon=True).start()

    def _log_waiting(self, has_results: Event) -> None:
        waited, seconds = 0.0, FIRST_WAIT
        while not has_results.wait(seconds - waited):
            waited, seconds = seconds, 2 * seconds
            message = "no image is finished after %s; images of one batch finish together, and the first may be slow"
            log.info(message, format_duration(waited), extra={"seconds": waited})

    def committed(self, rows: Sequence[ResultRow]) -> None:
        super().committed(rows)
        self._has_results.set()
        self._has_unlogged = True
        if self._clock() - self._logged_at >= LOG_INTERVAL:
            self._log_counts()

    def close(self) -> None:
        self._has_results.set()
        if self._has_unlogged:
            self._log_counts()

    def _log_counts(self) -> None:
        self._logged_at, self._has_unlogged = self._clock(), False
        fields = {name: getattr(self, name) for name in ("done", "total", "images_per_second", "seconds_left")}
        log.info("%d of %d, %s", self.done, self.total, self, extra=fields)
