"""The dry run: every row validated, and what rendering them would take, with nothing rendered or written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from batch_infer.autotune import Probe
from batch_infer.errors import RowError, SettingsError
from batch_infer.jobs.changes import find_changes
from batch_infer.jobs.estimate import rates_of
from batch_infer.jobs.job import Job, find_model, finishing_overwrite, make_paths_absolute, open_tables, prepare
from batch_infer.jobs.record import at_once, processes_of
from batch_infer.jobs.scan import reason_of
from batch_infer.jobs.tune import BatchShapes
from batch_infer.main_guard import end_unguarded_process
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.models import TruncationCounter, load_token_counter
from batch_infer.planning import (
    Item,
    ManifestEntry,
    PipelineBatchingEstimator,
    StepBatchingEstimator,
    is_done,
    order_requests,
    select_pending,
)
from batch_infer.records import PromptRequest, ResultRow, utc_now
from batch_infer.settings import IdSource, RunSettings

WALKS = 3
"""How often a run goes through the tables: to look, to render and to merge."""


@dataclass(slots=True)
class SizePlan:
    """What the images of one size take: `seconds` of device time."""

    height: int
    width: int
    images: int
    row_forwards: int
    ticks: int
    slots: int
    seconds: float


@dataclass(slots=True)
class Plan:
    """What a run would do, counted in results (a row has one for each image) but where rows are named.

    `seconds` are of the whole command, from start to end; those of a size are device time, of which each of the
    `processes` has its share. `truncated` is None where only the model's pipeline knows. `reasons` says why results
    are pending, `changes` by which options they changed, and `refused` why the run will not start. `files` has the
    number of rows of each file that is read, `left_out` those of folders and globs that are not, by reason.
    """

    rows: int = 0
    invalid_rows: int = 0
    total: int = 0
    invalid: int = 0
    done: int = 0
    pending: int = 0
    truncated: int | None = 0
    slots: int = 0
    processes: int = 1
    sizes: list[SizePlan] = field(default_factory=list)
    row_forwards: int = 0
    ticks: int = 0
    occupancy: float | None = None
    seconds: float = 0.0
    bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    changes: str = ""
    refused: str | None = None
    cost: float | None = None
    files: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    default_ids: IdSource | None = None
    measured_at: datetime | None = None

    def as_dict(self) -> dict[str, Any]:
        """As --json has it."""
        return {**asdict(self), "measured_at": self.measured_at and self.measured_at.isoformat()}


def make_plan(settings: RunSettings, tell: Callable[[ResultRow], None]) -> Plan:
    """Find out what `run` would do with these settings; `tell` is called with every invalid row as it is found.

    Raises the UsageErrors that `run` would raise.
    """
    end_unguarded_process()
    settings = finishing_overwrite(make_paths_absolute(settings))
    with open_tables(settings) as tables, Probe() as probe:
        card = find_model(settings, probe.read_pipeline_facts)
        device = probe.find_device(settings.model.device)
        job = prepare(settings, tables, card, device)
        with ManifestIndex([]) if settings.overwrite else Manifest(settings.out).index() as index:
            return _Walk(job, processes_of(settings, device), probe, index, tell).go()


class _Walk:
    """One walk over the tables, with a tally of what is met."""

    def __init__(
        self, job: Job, processes: int, probe: Probe, index: ManifestIndex, tell: Callable[[ResultRow], None]
    ) -> None:
        self._job, self._probe, self._index, self._tell = job, probe, index, tell
        self._shapes = BatchShapes(job, probe)
        self._packing = (PipelineBatchingEstimator if job.card.uses_pipeline_call else StepBatchingEstimator)(
            self._slots_of
        )
        counter = load_token_counter(job.card)
        self._tokens = TruncationCounter(counter) if counter else None
        self._plan = Plan(slots=job.compute.slots, processes=processes)

    def go(self) -> Plan:
        found, card = self._plan, self._job.card
        started = time.monotonic()
        waited = self._probe.seconds_waited
        slots_of = None if card.uses_pipeline_call else self._slots_of
        changes = find_changes(self._job, self._index)
        found.changes = str(changes)
        try:
            changes.refuse(self._job)
        except SettingsError as error:
            found.refused = str(error)
        for request in order_requests(select_pending(self._valid(), self._index, self._is_done), slots_of):
            found.pending += 1
            self._packing.add(request, self._probe.count_evaluations(card, request.params.num_inference_steps))
        self._packing.close()
        found.default_ids = self._job.tables.default_id_source
        found.remarks, found.left_out = self._job.tables.remarks, self._job.tables.left_out.items()
        found.truncated = self._tokens.close() if self._tokens else None
        found.done = found.total - found.invalid - found.pending
        walking = time.monotonic() - started - (self._probe.seconds_waited - waited)
        self._estimate(WALKS * walking)
        return found

    def _slots_of(self, size: tuple[int, int]) -> int:
        return self._shapes.of(size).slots

    def _is_done(self, item: Item, match: ManifestEntry | None) -> bool:
        done = is_done(item, match)
        if not done:
            reason = reason_of(item, match)
            self._plan.reasons[reason] = self._plan.reasons.get(reason, 0) + 1
        return done

    def _valid(self) -> Iterator[PromptRequest]:
        """The rows of the tables that the run will render; what it will find invalid is told and counted."""
        self._plan.files = dict.fromkeys(self._job.tables.files, 0)
        for item in self._job.items(self._index):
            self._plan.total += 1
            if item.image_index == 0:
                self._plan.rows += 1
                self._plan.files[item.source.file] += 1
            if isinstance(item, PromptRequest):
                try:
                    self._probe.count_evaluations(self._job.card, item.params.num_inference_steps)
                except RowError as error:
                    item = _refused(item, error)
                else:
                    if item.image_index == 0 and self._tokens:
                        self._tokens.add(item.prompt)
                    yield item
                    continue
            self._plan.invalid += 1
            self._plan.invalid_rows += item.image_index == 0
            self._tell(item)

    def _estimate(self, walking: float) -> None:
        found, settings, loads = self._plan, self._job.settings, self._packing.costs
        if not loads:
            return
        job = replace(self._job, compute=self._shapes.settle(loads))
        rates = rates_of(loads, job, self._probe)
        for size, load in loads.items():
            rate = rates[size]
            seconds = load.ticks * rate.tick + load.images * rate.image
            counts = load.images, load.row_forwards, load.ticks, load.slots
            found.sizes.append(SizePlan(*size, *counts, round(seconds, 3)))
        found.row_forwards = sum(load.row_forwards for load in loads.values())
        found.ticks = sum(load.ticks for load in loads.values())
        found.occupancy = round(found.row_forwards / sum(load.ticks * load.slots for load in loads.values()), 4)
        rendering = sum(size.seconds for size in found.sizes) / at_once(found.processes, job.compute)
        found.seconds = walking + next(iter(rates.values())).start + rendering
        found.bytes = round(sum(load.images * rates[size].image_bytes for size, load in loads.items()))
        found.measured_at = min(rate.measured_at for rate in rates.values())
        if settings.price_per_hour is not None:
            found.cost = found.seconds / 3600 * settings.price_per_hour


def _refused(request: PromptRequest, error: RowError) -> ResultRow:
    """A row whose steps the scheduler does not take, as the worker will find it."""
    return ResultRow(
        id=request.id,
        image_index=request.image_index,
        prompt=request.prompt,
        status="invalid",
        error=str(error),
        finished_at=utc_now(),
        source_file=request.source.file,
        source_row=request.source.row,
        fingerprint=request.fingerprint,
        line=request.source.line,
    )
