"""`--metrics-file FILE`: write the progress and the outcome of a run as Prometheus metrics.

The text format is that of node_exporter's textfile collector (https://github.com/prometheus/node_exporter). Every
series has the label `out`, so that each OUT can have its own file.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from batch_infer import __version__
from batch_infer.cli.logs import log
from batch_infer.errors import BatchInferError, LockedError, SettingsError, StoppedError
from batch_infer.records import Status

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from batch_infer.jobs import ScanResult, Summary, Throughput
    from batch_infer.records import ResultRow

WRITE_INTERVAL = 10.0
"""Minimum number of seconds between writes while results are committed."""
STATUSES: tuple[str, ...] = get_args(Status)
GAUGES = {
    "results_left": "Images of the tables that have no result yet.",
    "images_rendered": "Images that the last run rendered.",
    "images_per_second": "Images per second of the last run, from when its first worker was ready.",
    "workers": "Worker processes at the end of the last run, 0 if it rendered in the command's process.",
    "worker_deaths": "Worker processes that died in the last run, known at its end.",
    "energy_watt_hours": "Energy of the GPUs while the last run rendered, if they report it, known at its end.",
    "running": "1 during a run, else 0.",
    "start_timestamp_seconds": "When the last run started.",
    "end_timestamp_seconds": "When a run last ended.",
    "last_success_timestamp_seconds": "When a run last ended with exit code 0.",
    "exit_code": "Exit code of the run that ended last.",
}
BUG = 1
"""Exit code after an unexpected exception."""


class Metrics:
    """Writes the metrics file of a run on progress and at the end of the context. Without a file, it writes nothing.

    If the run ends before it has locked OUT, the file is written only at the end. If another run has locked OUT,
    nothing is written, because the file belongs to that run. Values that are not known yet are kept from an earlier
    file for the same OUT, except the numbers of workers and of their deaths, and the energy.
    """

    def __init__(self, file: Path | None, out: str, model: str = "") -> None:
        self.model = model
        self._file = file if file is not None and _is_first_rank() else None
        self._out = out if "://" in out else os.path.abspath(Path(out).expanduser())  # noqa: PTH100  # keep links
        self._gauges: dict[str, float] = {}
        self._results: dict[str, int] = {}
        self._code = BUG
        self._throughput: Throughput | None = None
        self._entered_at = self._written_at = 0.0
        self._is_initialized = self._has_warned = False

    def __enter__(self) -> Metrics:
        """Check that the file can be written. Raises SettingsError."""
        if self._file is not None:
            try:  # create a temporary file next to the metrics file, as each write does
                tempfile.NamedTemporaryFile(dir=self._file.parent, prefix=f"{self._file.name}.").close()
            except OSError as error:
                reason = error.strerror or error
                raise SettingsError(f"--metrics-file {self._file} cannot be written: {reason}") from error
            if self._file.suffix != ".prom":
                log.warning("node_exporter's textfile collector reads only *.prom files, so it ignores %s", self._file)
        self._entered_at = time.time()
        return self

    def start(self, scan: ScanResult) -> None:
        """Write the first metrics of a run that has locked OUT."""
        self._initialize()
        self._throughput = None
        results = dict(scan.skipped)
        self._gauges |= {"running": 1, "results_left": results.pop("left", 0) + scan.pending}
        self._results = dict.fromkeys(STATUSES, 0) | results
        self._results["invalid"] += scan.invalid
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
        if time.monotonic() - self._written_at >= WRITE_INTERVAL:
            self._write()

    def close(self) -> None:
        """Do nothing when rendering ends: the run continues."""

    def conclude(self, summary: Summary, code: int) -> None:
        """Set the final values. They are written at the end of the context."""
        self._initialize()
        counts, self._code = summary.counts, code
        self._results = {status: getattr(counts, status) for status in STATUSES}
        self._gauges |= {
            "results_left": counts.remaining,
            "images_rendered": summary.rendered,
            "images_per_second": summary.images_per_second or 0,
            "workers": summary.processes,
            "worker_deaths": summary.deaths,
        }
        if summary.energy_wh is not None:
            self._gauges["energy_watt_hours"] = summary.energy_wh

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, LockedError) and not self._is_initialized:
            return
        self._initialize()
        if isinstance(error, (BatchInferError, click.ClickException)):
            self._code = error.exit_code
        elif error is not None:
            self._code = StoppedError.exit_code if isinstance(error, (KeyboardInterrupt, click.Abort)) else BUG
        now = time.time()
        self._gauges |= {"running": 0, "end_timestamp_seconds": now, "exit_code": self._code}
        if self._code == 0:
            self._gauges["last_success_timestamp_seconds"] = now
        self._write()

    def _initialize(self) -> None:
        """On the first call, read the values of an earlier run and set the initial values of this run."""
        if self._is_initialized:
            return
        self._is_initialized = True
        if self._file is not None:
            self._read(self._file)
        for unknown in ("workers", "worker_deaths", "energy_watt_hours"):
            self._gauges.pop(unknown, None)
        self._gauges |= {"start_timestamp_seconds": self._entered_at, "images_rendered": 0, "images_per_second": 0}

    def _read(self, file: Path) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        try:
            families = list(text_string_to_metric_families(file.read_text("utf-8")))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("the metrics file %s cannot be read, so it is replaced: %s", file, error)
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
        self._written_at = time.monotonic()
        if self._file is None:
            return
        from prometheus_client import write_to_textfile

        try:
            write_to_textfile(str(self._file), self._registry())
        except OSError as error:
            if not self._has_warned:
                log.error("the metrics file %s cannot be written: %s", self._file, error.strerror or error)
            self._has_warned = True

    def _registry(self) -> CollectorRegistry:
        from prometheus_client import CollectorRegistry, Gauge, Info

        registry = CollectorRegistry()
        info = Info("batch_infer", "Version and model of the last run.", ["out"], registry=registry)
        info.labels(self._out).info({"version": __version__, "model": self.model})
        results = Gauge("batch_infer_results", "Results by status.", ["out", "status"], registry=registry)
        for status, count in self._results.items():
            results.labels(self._out, status).set(count)
        for name, value in self._gauges.items():
            Gauge(f"batch_infer_{name}", GAUGES[name], ["out"], registry=registry).labels(self._out).set(value)
        return registry


def _is_first_rank() -> bool:
    """Return whether no launcher started this process, or it is the launcher's rank 0. Other ranks write no metrics."""
    from batch_infer.engines import read_rank_info

    rank_info = read_rank_info()
    return rank_info is None or rank_info.rank == 0
