"""Count the results of a run, measure its throughput, and summarise it for run.json and --json."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, ClassVar

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.energy import sum_energy
from batch_infer.engines import TaskReport
from batch_infer.records import ResultRow, Source
from batch_infer.stages import Stages

MAX_BAD_RESULTS = 20
"""Maximum number of failed and invalid results to list, and of their different reasons. results.* contain all."""
_SAFETY_STATUSES = frozenset({"blocked", "flagged"})
_REASON_STATUSES = _SAFETY_STATUSES | {"failed", "invalid"}
_SPECIFIC = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+(?:\.\d+)?")
"""Quoted texts and numbers in an error. Errors that differ only in these have the same reason."""


class JsonStruct(msgspec.Struct):
    """Values for --json or run.json. The class argument `rename` maps fields to other keys.

    A key in `only_if_known` is left out if its value is empty or None.
    """

    only_if_known: ClassVar[frozenset[str]] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        values = msgspec.to_builtins(self)
        return {key: value for key, value in values.items() if value or key not in self.only_if_known}


class Reason(JsonStruct):
    """A reason for results that are not ok: how many have it, the location and id of the first, and its error."""

    status: str
    results: int
    first: str
    error: str


class Counts(JsonStruct, rename={"remaining": "left"}):
    """Number of rows, of stored images, and of results (one per image or invalid row) by status.

    `remaining` results do not exist yet.
    """

    rows: int = 0
    images: int = 0
    ok: int = 0
    flagged: int = 0
    blocked: int = 0
    invalid: int = 0
    failed: int = 0
    remaining: int = 0
    bad_rows: int = 0
    """Rows with a failed or invalid result."""
    truncated: int = 0
    """Rows whose prompt exceeds the length that the model reads."""
    bad_results: list[str] = []
    """The first failed and invalid results, each as one line with its location, id and error."""
    reasons: list[Reason] = []
    """The first different reasons for failed and invalid results, and one each for all blocked and all flagged ones.

    Numbers and quoted texts make no difference.
    """
    first_truncated: str | None = None
    """Location and id of the first row in `truncated`."""
    folders: dict[str, int] = {}
    """Number of stored images by their folder in OUT: images, quarantine or shards."""
    only_if_known: ClassVar[frozenset[str]] = frozenset({"reasons", "first_truncated", "folders"})

    def add(self, table: pa.Table, sources: Sequence[Source] = ()) -> None:
        """Count the results in a table. `sources` are their current files and row numbers, if known."""
        statuses = table["status"].to_pylist()
        for status, count in Counter(statuses).items():
            setattr(self, status, getattr(self, status) + count)
        paths = table["generated_image"].drop_null()
        self.images += len(paths)
        for folder in pc.value_counts(pc.replace_substring_regex(paths, "/.*$", "")).to_pylist():
            self.folders[folder["values"]] = self.folders.get(folder["values"], 0) + folder["counts"]
        truncated = pc.and_(pc.equal(table["image_index"], 0), pc.fill_null(table["prompt_truncated"], False))
        self.truncated += pc.sum(truncated).as_py() or 0
        if self.truncated and self.first_truncated is None:
            self.first_truncated = _locate(table, pc.index(truncated, True).as_py(), sources)
        indices = [index for index, status in enumerate(statuses) if status in _REASON_STATUSES]
        bad_indices = (index for index in indices if statuses[index] not in _SAFETY_STATUSES)
        for index in islice(bad_indices, MAX_BAD_RESULTS - len(self.bad_results)):
            self.bad_results.append(f"{_locate(table, index, sources)}: {table['error'][index].as_py()}")
        errors = table["error"].take(indices).to_pylist() if indices else ()
        for index, error in zip(indices, errors, strict=True):
            self._add_reason(statuses[index], error or "", partial(_locate, table, index, sources))

    def add_row(self, row: ResultRow) -> None:
        """Count a result only in the reasons and in the truncated prompts."""
        image = f", image {row.image_index}" if row.image_index else ""
        location = f"{row.source} ({row.id}{image})"
        if row.image_index == 0 and row.prompt_truncated:
            self.truncated += 1
            self.first_truncated = self.first_truncated or location
        if row.status in _REASON_STATUSES:
            self._add_reason(row.status, row.error or "", lambda: location)

    def _add_reason(self, status: str, error: str, locate: Callable[[], str]) -> None:
        key = _reason_key(status, error)
        for reason in self.reasons:
            if _reason_key(reason.status, reason.error) == key:
                reason.results += 1
                return
        bad_reasons = sum(reason.status not in _SAFETY_STATUSES for reason in self.reasons)
        if status in _SAFETY_STATUSES or bad_reasons < MAX_BAD_RESULTS:
            self.reasons.append(Reason(status, 1, locate(), error))

    @property
    def results(self) -> int:
        return self.ok + self.flagged + self.blocked + self.invalid + self.failed


def _reason_key(status: str, error: str) -> tuple[str, str]:
    """Return the key by which results are grouped. All blocked results share one, and all flagged ones."""
    return status, "" if status in _SAFETY_STATUSES else generalize_error(error)


def _locate(table: pa.Table, index: int, sources: Sequence[Source]) -> str:
    """Return the location and id of a result, as `t.csv, line 5 (t-00000003, image 1)`."""
    names = ["id", "image_index", "source_file", "source_row"]
    (row,) = table.slice(index, 1).select(names).to_pylist()
    source = sources[index] if sources else Source(row["source_file"], row["source_row"])
    image = f", image {row['image_index']}" if row["image_index"] else ""
    return f"{source} ({row['id']}{image})"


@lru_cache(maxsize=1024)
def generalize_error(error: str) -> str:
    """Return an error without its numbers and quoted texts, so that errors with the same reason are equal."""
    return _SPECIFIC.sub("#", error)


class Throughput:
    """Measures images per second from when the first worker is ready to the latest commit.

    Create it when the first worker is ready, since loading the model does not count. Progress and metrics use this
    rate. Only `ok` and `flagged` results count as images.

    Rows rendered together finish together, but their results arrive one by one. The rate is None until `in_flight`
    results, the number in progress at a time, are committed. Until then, it would divide the first few of these results
    by the time spent on all.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, in_flight: int = 1) -> None:
        self._clock, self._in_flight = clock, in_flight
        self._ready_at = self._latest = clock()
        self.committed = 0
        self.rendered = 0

    def add(self, rows: Sequence[ResultRow]) -> None:
        self.committed += len(rows)
        self.rendered += sum(row.status in ("ok", "flagged") for row in rows)
        self._latest = self._clock()

    @property
    def seconds(self) -> float:
        """Seconds from when the first worker is ready to the latest commit."""
        return self._latest - self._ready_at

    @property
    def images_per_second(self) -> float | None:
        return self.rendered / self.seconds if self._is_settled and self.rendered and self.seconds else None

    def estimate_seconds(self, results: int) -> float | None:
        """Estimate the seconds for this many more results, or return None until `in_flight` results are committed."""
        return results * self.seconds / self.committed if self._is_settled else None

    @property
    def _is_settled(self) -> bool:
        return self.committed >= max(1, self._in_flight)


class Summary(JsonStruct, rename={"unfinished": "undone"}):
    """Results and performance of one run. Only `counts` includes results of earlier runs.

    `row_forwards` counts the batch elements of denoiser calls that belong to a row, and `ticks` the calls. `occupancy`
    is the share of all batch elements that belong to a row. `unet_busy` is the share of time spent in denoiser calls
    between the first and the last call. `mfu` is the model FLOPS utilisation, or None if it is unknown. `stage_shares`
    are shares of the sum of all stages' times, since stages overlap on a GPU. Shares cover all workers together.
    `processes` is the number of workers, or 0 if nothing was rendered or the command itself rendered, and `deaths` the
    number of workers that died. `peak_memory` is the maximum over processes, in bytes. `unfinished` results remain for
    the next run. `rendered` and `rendering_seconds` come from `Throughput`. `energy_wh` is the energy of the whole GPUs
    in watt-hours while their workers rendered, or None if it is unknown.
    """

    counts: Counts = msgspec.field(default_factory=Counts)
    rendered: int = 0
    seconds: float = 0.0
    cost: float | None = None
    rendering_seconds: float = 0.0
    row_forwards: int = 0
    ticks: int = 0
    occupancy: float | None = None
    unet_busy: float | None = None
    mfu: float | None = None
    stage_shares: dict[str, float] = {}
    peak_memory: dict[str, int] = {}
    processes: int = 0
    deaths: int = 0
    unfinished: int = 0
    energy_wh: float | None = None
    only_if_known: ClassVar[frozenset[str]] = frozenset({"energy_wh"})

    def set_speed(self, throughput: Throughput) -> None:
        self.rendered, self.rendering_seconds = throughput.rendered, throughput.seconds

    def add(self, report: TaskReport) -> None:
        """Set the figures that come from the workers' reports."""
        self.processes, self.deaths = report.processes, report.deaths
        for worker in report.worker_reports:
            self.add_peak_memory(worker.peak_memory)
        totals = [worker.total for worker in report.worker_reports]
        stages = sum(totals, Stages())
        self.row_forwards, self.ticks = stages.row_forwards, stages.ticks
        if not stages.ticks:  # stopped before the first denoiser call
            return
        energy = sum_energy(worker.energy for worker in report.worker_reports if worker.total.ticks)
        self.energy_wh = None if energy is None else round(energy, 6)
        self.occupancy = round(stages.occupancy, 4)
        self.stage_shares = stages.shares
        spans = sum(total.span for total in totals)
        self.unet_busy = round(stages.denoise / spans, 4) if spans else 0.0
        measured = [(worker.mfu, worker.total.seconds) for worker in report.worker_reports if worker.mfu is not None]
        total_seconds = sum(seconds for _, seconds in measured)
        if total_seconds:
            self.mfu = round(sum(mfu * seconds for mfu, seconds in measured) / total_seconds, 4)

    def add_peak_memory(self, peaks: Mapping[str, int]) -> None:
        """Update the peak of each kind of memory, in bytes."""
        for name, peak in peaks.items():
            self.peak_memory[name] = max(peak, self.peak_memory.get(name, 0))

    @property
    def images_per_second(self) -> float | None:
        return self.rendered / self.rendering_seconds if self.rendered and self.rendering_seconds else None

    @property
    def energy_wh_per_image(self) -> float | None:
        return self.energy_wh / self.rendered if self.energy_wh and self.rendered else None

    def as_dict(self) -> dict[str, Any]:
        """Return the summary with the keys of run.json and --json."""
        figures = super().as_dict()
        rate, energy = self.images_per_second, self.energy_wh_per_image
        del figures["counts"], figures["rendering_seconds"]
        rounded = {"seconds": round(self.seconds, 3), "images_per_second": rate and round(rate, 3)}
        if energy is not None:
            rounded["energy_wh_per_image"] = round(energy, 6)
        return {**self.counts.as_dict(), **figures, **rounded}

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> Summary:
        """Return the summary of a run.json. Raises msgspec.ValidationError if a value has another type."""
        summary = msgspec.convert(figures, cls)
        summary.counts = msgspec.convert(figures, Counts)
        if rate := msgspec.convert(figures.get("images_per_second"), float | None):
            summary.rendering_seconds = summary.rendered / rate
        return summary
