"""`--metrics-file FILE`: how a run goes and how it ended, for Prometheus.

In the text format that node_exporter's textfile collector reads (https://github.com/prometheus/node_exporter). Every
series bears the label `out`, so that several OUTs may have a file each.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, get_args

import click

from batch_infer import __version__
from batch_infer.cli.logs import log
from batch_infer.errors import BatchInferError, Interrupted, LockedError, SettingsError
from batch_infer.records import Status

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from batch_infer.jobs import ScanResult, Summary, Throughput
    from batch_infer.records import ResultRow

WRITE_EVERY = 10.0
"""Seconds between two writes, while results are committed."""
STATUSES: tuple[str, ...] = get_args(Status)
GAUGES = {
    "results_left": "Images of the tables that have no result yet.",
    "images_rendered": "Images that the last run rendered.",
    "images_per_second": "Images that the last run rendered in a second: since its first worker was ready.",
    "workers": "Worker processes that the last run ended with, 0 where it rendered by itself; told at its end.",
    "worker_deaths": "Worker processes that died in the last run; told at its end.",
    "running": "1 while a run goes on, else 0.",
    "start_timestamp_seconds": "When the last run started.",
    "end_timestamp_seconds": "When a run last ended.",
    "last_success_timestamp_seconds": "When a run last ended with exit code 0.",
    "exit_code": "Exit code of the run that ended last.",
}
RESULTS = "Results of the tables, by status."
BUG = 1


class Metrics:
    """A run's metrics file; a Progress, and a context that writes however it is left.

    Before it holds OUT, a run writes no more than that an error has ended it, and not even that where another run holds
    OUT, whose file it is then. What this run does not know yet is kept from the file that an earlier one wrote. Without
    a file nothing is done.
    """

    def __init__(self, file: Path | None, out: str, model: str = "") -> None:
        self.model = model
        self._file = file if file is not None and _is_first() else None
        self._out = out if "://" in out else os.path.abspath(Path(out).expanduser())  # noqa: PTH100  # links keep their names
        self._gauges: dict[str, float] = {}
        self._results: dict[str, int] = {}
        self._code = BUG
        self._throughput: Throughput | None = None
        self._entered = self._written = 0.0
        self._started = self._warned = False

    def __enter__(self) -> Metrics:
        """Raises SettingsError where the file cannot be written."""
        if self._file is not None:
            _try(self._file)
            if self._file.suffix != ".prom":
                log.warning("node_exporter's textfile collector reads *.prom alone, and not %s", self._file)
        self._entered = time.time()
        return self

    def start(self, survey: ScanResult) -> None:
        """The run holds OUT, and begins to render."""
        self._take_up()
        self._throughput = None
        self._gauges["running"] = 1
        standing = dict(survey.skipped)
        self._gauges["results_left"] = standing.pop("left", 0) + survey.pending
        self._results = dict.fromkeys(STATUSES, 0) | standing
        self._results["invalid"] += survey.invalid
        self._write()

    def ready(self, throughput: Throughput) -> None:
        self._throughput = throughput

    def committed(self, rows: Sequence[ResultRow]) -> None:
        for row in rows:
            self._results[row.status] += 1
        self._gauges["results_left"] -= len(rows)
        self._gauges["images_rendered"] += sum(row.status in ("ok", "flagged") for row in rows)
        if self._throughput is not None:
            self._gauges["images_per_second"] = self._throughput.images_per_second or 0
        if time.monotonic() - self._written >= WRITE_EVERY:
            self._write()

    def close(self) -> None:
        """The rows are done; the run is not."""

    def conclude(self, summary: Summary, code: int) -> None:
        """What the run came to, to be written when its context is left."""
        self._take_up()
        counts, self._code = summary.counts, code
        self._results = {status: getattr(counts, status) for status in STATUSES}
        self._gauges |= {"results_left": counts.left, "images_rendered": summary.rendered}
        self._gauges["images_per_second"] = summary.images_per_second or 0
        self._gauges |= {"workers": summary.processes, "worker_deaths": summary.deaths}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, LockedError) and not self._started:
            return
        self._take_up()
        now, code = time.time(), self._code if error is None else _code_of(error)
        self._gauges |= {"running": 0, "end_timestamp_seconds": now, "exit_code": code}
        if code == 0:
            self._gauges["last_success_timestamp_seconds"] = now
        self._write()

    def _take_up(self) -> None:
        """Go on from what an earlier run has written, once."""
        if self._started:
            return
        self._started = True
        if self._file is not None:
            self._read(self._file)
        for unknown in ("workers", "worker_deaths"):
            self._gauges.pop(unknown, None)
        self._gauges |= {"start_timestamp_seconds": self._entered, "images_rendered": 0, "images_per_second": 0}

    def _read(self, file: Path) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        try:
            families = list(text_string_to_metric_families(file.read_text("utf-8")))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("the metrics file %s cannot be read, and is written anew: %s", file, error)
            return
        samples = [sample for family in families for sample in family.samples if sample.labels.get("out") == self._out]
        for sample in samples:
            name = sample.name.removeprefix("batch_infer_")
            if name == "info":
                self.model = self.model or sample.labels.get("model", "")
            elif not math.isfinite(sample.value):
                continue
            elif name in GAUGES:
                self._gauges[name] = sample.value
            elif name == "results" and sample.labels.get("status") in STATUSES:
                self._results[sample.labels["status"]] = int(sample.value)

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._file is None:
            return
        from prometheus_client import write_to_textfile

        try:
            write_to_textfile(str(self._file), self._registry())
        except OSError as error:
            if not self._warned:
                log.error("the metrics file %s cannot be written: %s", self._file, error.strerror or error)
            self._warned = True

    def _registry(self) -> CollectorRegistry:
        from prometheus_client import CollectorRegistry, Gauge, Info

        registry = CollectorRegistry()
        about = Info("batch_infer", "What the last run was made with.", ["out"], registry=registry)
        about.labels(self._out).info({"version": __version__, "model": self.model})
        results = Gauge("batch_infer_results", RESULTS, ["out", "status"], registry=registry)
        for status, count in self._results.items():
            results.labels(self._out, status).set(count)
        for name, told in GAUGES.items():
            if name in self._gauges:
                Gauge(f"batch_infer_{name}", told, ["out"], registry=registry).labels(self._out).set(self._gauges[name])
        return registry


def _is_first() -> bool:
    """Whether this is the command, or of a launcher's processes the first: the others render for it."""
    from batch_infer.engines import read_rank_info

    here = read_rank_info()
    return here is None or here.rank == 0


def _try(file: Path) -> None:
    """Raises SettingsError where no file can be written beside this one, which is how it is written."""
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}."):
            pass
    except OSError as error:
        raise SettingsError(f"--metrics-file {file} cannot be written: {error.strerror or error}") from error


def _code_of(error: BaseException) -> int:
    """The exit code that `__main__` will end with."""
    if isinstance(error, (BatchInferError, click.ClickException)):
        return error.exit_code
    return Interrupted.exit_code if isinstance(error, (KeyboardInterrupt, click.Abort)) else BUG
