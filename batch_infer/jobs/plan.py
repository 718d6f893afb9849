"""Validate every row and estimate the cost of a run, without rendering or writing anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from batch_infer.autotune import Probe
from batch_infer.errors import RowError, SettingsError
from batch_infer.jobs.estimates import BatchShapes, Size, find_rates
from batch_infer.jobs.job import (
    Job,
    count_parallel,
    count_workers,
    find_model,
    finish_overwrite,
    make_paths_absolute,
    open_tables,
    prepare,
)
from batch_infer.jobs.scan import explain_pending, find_changes
from batch_infer.jobs.summary import JsonStruct
from batch_infer.main_guard import end_unguarded_process
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.models import TruncationCounter, load_token_counter
from batch_infer.planning import (
    Item,
    ManifestEntry,
    PipelineBatchingEstimator,
    StepBatchingEstimator,
    is_finished,
    order_requests,
    select_pending,
)
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.settings import IdSource, RunSettings
from batch_infer.worker import make_row

TABLE_READS = 3
"""Number of times that a run reads the tables: to scan, to render and to merge."""


@dataclass(slots=True)
class SizePlan:
    """Cost of the images of one size. `seconds` is device time."""

    height: int
    width: int
    images: int
    row_forwards: int
    ticks: int
    slots: int
    seconds: float


class Plan(JsonStruct, rename={"finished": "done", "refusal": "refused"}):
    """What a run would do. Counts are of results (one per image) unless they name rows.

    `seconds` covers the whole command; in `sizes` it is device time, which the `processes` share. `truncated` is None
    if only the model's pipeline knows. `reasons` says why results are pending, `changes` names the options that changed
    them, and `refused` says why the run would not start. `files` maps each file read to its number of rows. `left_out`
    lists by reason the files of folders and globs that are not read.
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

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "measured_at": self.measured_at and self.measured_at.isoformat()}


def make_plan(settings: RunSettings, report: Callable[[ResultRow], None]) -> Plan:
    """Return what `run` would do with these settings, and call `report` with every invalid row.

    Raises the same UsageErrors as `run`.
    """
    end_unguarded_process()
    settings = finish_overwrite(make_paths_absolute(settings))
    with open_tables(settings) as tables, Probe() as probe:
        card = find_model(settings, probe.inspect_pipeline)
        device = probe.detect_device(settings.model.device)
        job = prepare(settings, tables, card, device)
        with ManifestIndex([]) if settings.overwrite else Manifest(settings.out).index() as index:
            return _Planner(job, count_workers(settings, device), probe, index, report).make()


class _Planner:
    """Reads the tables once and counts their results and costs."""

    def __init__(
        self, job: Job, processes: int, probe: Probe, index: ManifestIndex, report: Callable[[ResultRow], None]
    ) -> None:
        self._job, self._probe, self._index, self._report = job, probe, index, report
        self._shapes = BatchShapes(job, probe)
        estimator = PipelineBatchingEstimator if job.card.uses_pipeline_call else StepBatchingEstimator
        self._estimator = estimator(self._slots_of)
        counter = load_token_counter(job.card)
        self._tokens = TruncationCounter(counter) if counter else None
        self._plan = Plan(slots=job.compute.slots, processes=processes)

    def make(self) -> Plan:
        plan, tables = self._plan, self._job.tables
        started, waited_before = time.monotonic(), self._probe.seconds_waited
        changes = find_changes(self._job, self._index)
        plan.changes = str(changes)
        try:
            changes.refuse(self._job)
        except SettingsError as error:
            plan.refusal = str(error)
        self._count_evaluations()
        plan.default_ids = tables.default_id_source
        plan.remarks, plan.left_out = tables.notices, tables.ignored_files.group()
        plan.truncated = self._tokens.close() if self._tokens else None
        plan.finished = plan.total - plan.invalid - plan.pending
        reading_seconds = time.monotonic() - started - (self._probe.seconds_waited - waited_before)
        self._estimate(TABLE_READS * reading_seconds)
        return plan

    def _count_evaluations(self) -> None:
        """Count the UNet evaluations of the pending rows, in the order of the run."""
        card = self._job.card
        slots_of = None if card.uses_pipeline_call else self._slots_of
        for request in order_requests(select_pending(self._valid_rows(), self._index, self._is_finished), slots_of):
            self._plan.pending += 1
            self._estimator.add(request, self._probe.count_evaluations(card, request.params.num_inference_steps))
        self._estimator.close()

    def _slots_of(self, size: Size) -> int:
        return self._shapes.for_size(size).slots

    def _is_finished(self, item: Item, committed: ManifestEntry | None) -> bool:
        if is_finished(item, committed):
            return True
        reason = explain_pending(item, committed)
        self._plan.reasons[reason] = self._plan.reasons.get(reason, 0) + 1
        return False

    def _valid_rows(self) -> Iterator[PromptRequest]:
        """Yield the rows that are valid for the run, and count and report invalid rows."""
        plan = self._plan
        plan.files = dict.fromkeys(self._job.tables.files, 0)
        for item in self._job.items(self._index):
            plan.total += 1
            if item.image_index == 0:
                plan.rows += 1
                plan.files[item.source.file] += 1
            if isinstance(item, PromptRequest):
                try:
                    self._probe.count_evaluations(self._job.card, item.params.num_inference_steps)
                except RowError as error:
                    item = make_row(item, "invalid", str(error), scheduler=self._job.card.scheduler_name, worker="")
                else:
                    if item.image_index == 0 and self._tokens:
                        self._tokens.add(item.prompt)
                    yield item
                    continue
            plan.invalid += 1
            plan.invalid_rows += item.image_index == 0
            self._report(item)

    def _estimate(self, reading_seconds: float) -> None:
        """Estimate time, disk space and cost. The run spends `reading_seconds` on reading tables."""
        plan, settings, costs = self._plan, self._job.settings, self._estimator.costs
        if not costs:
            return
        job = replace(self._job, compute=self._shapes.choose(costs))
        rates = find_rates(costs, job, self._probe)
        for (height, width), cost in costs.items():
            rate = rates[height, width]
            size_plan = SizePlan(
                height=height,
                width=width,
                images=cost.images,
                row_forwards=cost.row_forwards,
                ticks=cost.ticks,
                slots=cost.slots,
                seconds=round(cost.ticks * rate.tick + cost.images * rate.image, 3),
            )
            plan.sizes.append(size_plan)
        plan.row_forwards = sum(cost.row_forwards for cost in costs.values())
        plan.ticks = sum(cost.ticks for cost in costs.values())
        plan.occupancy = round(plan.row_forwards / sum(cost.ticks * cost.slots for cost in costs.values()), 4)
        rendering = sum(size.seconds for size in plan.sizes) / count_parallel(plan.processes, job.compute)
        plan.seconds = reading_seconds + next(iter(rates.values())).start + rendering
        plan.bytes = round(sum(cost.images * rates[size].image_bytes for size, cost in costs.items()))
        plan.measured_at = min(rate.measured_at for rate in rates.values())
        if settings.price_per_hour is not None:
            plan.cost = plan.seconds / 3600 * settings.price_per_hour
