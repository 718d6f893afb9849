"""Validate the rows and estimate the cost of a run, without rendering the rows or writing to OUT."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from batch_infer.autotune import Probe
from batch_infer.errors import RowError, SettingsError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.compute import count_parallel, count_workers
from batch_infer.jobs.estimates import BatchShapes, Size, find_rates
from batch_infer.jobs.job import Job, find_model, make_paths_absolute, open_tables, prepare
from batch_infer.jobs.scan import ScanResult, find_changes
from batch_infer.jobs.summary import MAX_BAD_RESULTS, JsonStruct
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.models import TruncationCounter, load_token_counter
from batch_infer.planning import BatchingEstimator, is_finished, order_requests
from batch_infer.records import PromptRequest, ResultRow, RowCost
from batch_infer.settings import IdSource, RunSettings
from batch_infer.store import open_store
from batch_infer.worker import make_row

log = logging.getLogger("batch_infer")

TABLE_READS = 3
"""Number of times that a run usually reads the tables: to scan, to render and to merge."""


@dataclass(slots=True)
class SizePlan:
    """Cost of all pending images of one size. `seconds` is device time."""

    height: int
    width: int
    images: int
    row_forwards: int
    ticks: int
    slots: int
    seconds: float


class Plan(JsonStruct, rename={"finished": "done", "refusal": "refused"}):
    """What a run would do.

    `total`, `invalid`, `finished` and `pending` count results: one per image, or one for a row with invalid cells.
    `seconds` is the estimated duration of `run`. In `sizes`, it is device time, which the `processes` share.
    `truncated` counts rows whose prompt is too long for the model, or is None if only its pipeline can count tokens.
    `reasons` counts pending results by reason, `changes` names the options that changed, and `refusal` is the error
    with which `run` would refuse these changes, or None. `files` maps each table to its number of rows. `left_out`
    counts the ignored files of folders and globs by reason and name.
    """

    rows: int = 0
    invalid_rows: int = 0
    total: int = 0
    invalid: int = 0
    finished: int = 0
    pending: int = 0
    truncated: int | None = 0
    slots: int = 0
    processes: int = 1
    sizes: list[SizePlan] = []
    row_forwards: int = 0
    ticks: int = 0
    occupancy: float | None = None
    seconds: float = 0.0
    bytes: int = 0
    reasons: dict[str, int] = {}
    changes: str = ""
    refusal: str | None = None
    cost: float | None = None
    files: dict[str, int] = {}
    left_out: dict[str, dict[str, int]] = {}
    remarks: list[str] = []
    default_ids: IdSource | None = None
    measured_at: datetime | None = None
    bad_results: list[str] = []
    """The first invalid rows with their locations and errors. --json lists all of them instead."""

    def as_dict(self) -> dict[str, Any]:
        values = {**super().as_dict(), "measured_at": self.measured_at and self.measured_at.isoformat()}
        del values["bad_results"]
        return values


def make_plan(settings: RunSettings, report: Callable[[ResultRow], object] = lambda _: None) -> Plan:
    """Return what `run` would do, and call `report` with every invalid result.

    Raises UsageError as `run` does, except for changed options: `refusal` is that error. Raises StorageError,
    ServiceError.
    """
    settings = make_paths_absolute(settings)
    store = open_store(settings.out)
    existing = outdir.read_run(store)
    with open_tables(settings) as tables, Probe() as probe:
        card = find_model(settings, probe.inspect_pipeline)
        device = probe.detect_device(settings.model.device)
        job = prepare(settings, store, existing, tables, card, device)
        with ManifestIndex([]) if job.settings.overwrite else Manifest(store).index() as index:
            return _Planner(job, count_workers(settings, device), probe, index, report).make()


class _Planner:
    """Reads the tables, counts results and estimates costs."""

    def __init__(
        self, job: Job, processes: int, probe: Probe, index: ManifestIndex, report: Callable[[ResultRow], object]
    ) -> None:
        self._job, self._probe, self._index, self._report = job, probe, index, report
        self._shapes = BatchShapes(job, probe)
        self._estimator = BatchingEstimator(self._slots_of)
        counter = load_token_counter(job.card)
        self._tokens = TruncationCounter(counter) if counter else None
        self._plan, self._scan = Plan(slots=job.compute.slots, processes=processes), ScanResult()

    def make(self) -> Plan:
        plan, scan, tables = self._plan, self._scan, self._job.tables
        started, waited_before = time.monotonic(), self._probe.seconds_waited
        changes = find_changes(self._job, self._index)
        plan.changes = str(changes)
        try:
            changes.refuse(self._job)
        except SettingsError as error:
            plan.refusal = str(error)
        for request in order_requests(self._pending_rows(), self._slots_of):
            self._estimator.add(request, self._count_cost(request))
        self._estimator.close()
        plan.total, plan.invalid, plan.finished, plan.pending = scan.total, scan.invalid, scan.finished, scan.pending
        plan.reasons, plan.default_ids = scan.reasons, tables.default_id_source
        plan.remarks, plan.left_out = tables.notices, tables.ignored_files.group()
        plan.truncated = self._tokens.close() if self._tokens else None
        reading_seconds = time.monotonic() - started - (self._probe.seconds_waited - waited_before)
        self._estimate(TABLE_READS * reading_seconds)
        return plan

    def _count_cost(self, request: PromptRequest) -> RowCost:
        """Return the cost of a row. Raises RowError if the model refuses its values."""
        return self._probe.count_cost(self._job.card, self._job.compute, request)

    def _slots_of(self, size: Size) -> int:
        return self._shapes.for_size(size).slots

    def _pending_rows(self) -> Iterator[PromptRequest]:
        """Count all rows and results, report the invalid results, and yield the pending requests."""
        plan, card = self._plan, self._job.card
        plan.files = dict.fromkeys(self._job.tables.files, 0)
        for item in self._job.items(self._index):
            is_first_image = item.image_index == 0
            plan.rows += is_first_image
            plan.files[item.source.file] += is_first_image
            if isinstance(item, PromptRequest):
                try:
                    self._count_cost(item)
                except RowError as error:
                    item = make_row(item, "invalid", str(error), scheduler=card.scheduler_name, worker="")
            committed = self._index.find(item.key)
            is_skipped = is_finished(item, committed)
            self._scan.add(item, committed, skip=is_skipped)
            if isinstance(item, ResultRow):
                plan.invalid_rows += is_first_image
                if is_first_image and len(plan.bad_results) < MAX_BAD_RESULTS:
                    plan.bad_results.append(f"{item.source} ({item.id}): {item.error}")
                self._report(item)
                continue
            if is_first_image and self._tokens:
                self._tokens.add(item.prompt)
            if not is_skipped:
                yield item

    def _estimate(self, reading_seconds: float) -> None:
        """Estimate time, disk space and cost. `reading_seconds` is the time that the run spends reading tables."""
        plan, settings, costs = self._plan, self._job.settings, self._estimator.costs
        if not costs:
            return
        if plan.bad_results:  # known now, and the list comes after measuring
            verb = "is invalid:" if plan.invalid_rows == 1 else "are invalid; the first is"
            log.info("%d of %d rows %s %s", plan.invalid_rows, plan.rows, verb, plan.bad_results[0])
        job = replace(self._job, compute=self._shapes.choose(costs))
        rates = find_rates(costs, job, self._probe)
        for (height, width), cost in costs.items():
            rate = rates[height, width]
            seconds = round(cost.ticks * rate.tick + cost.images * rate.image, 3)
            size = SizePlan(height, width, cost.images, cost.row_forwards, cost.ticks, cost.slots, seconds)
            plan.sizes.append(size)
        plan.row_forwards = sum(cost.row_forwards for cost in costs.values())
        plan.ticks = sum(cost.ticks for cost in costs.values())
        available = sum(cost.ticks * cost.slots for cost in costs.values())
        plan.occupancy = round(plan.row_forwards / available, 4) if available else 0.0
        rendering = sum(size.seconds for size in plan.sizes) / count_parallel(plan.processes, job)
        plan.seconds = reading_seconds + next(iter(rates.values())).start + rendering
        plan.bytes = round(sum(cost.images * rates[size].image_bytes for size, cost in costs.items()))
        plan.measured_at = min(rate.measured_at for rate in rates.values())
        if settings.price_per_hour is not None:
            plan.cost = plan.seconds / 3600 * settings.price_per_hour
