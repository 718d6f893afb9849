"""The run: find out what is not done, have it rendered, merge, sum up."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batch_infer.errors import UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.estimate import Size, learn
from batch_infer.jobs.job import Job, find_model, open_tables, prepare, rooted
from batch_infer.jobs.merge import Counts, merge, merge_parts
from batch_infer.jobs.results import remove_other_results
from batch_infer.jobs.summary import Summary, peak_memory
from batch_infer.jobs.survey import Survey, look_through
from batch_infer.jobs.tune import BatchShapes, learn_shapes
from batch_infer.manifest import Index, Manifest
from batch_infer.planning import LeavesAlone, chunks, is_done, pending
from batch_infer.records import ResultRow, now
from batch_infer.settings import Compute, RunSettings

if TYPE_CHECKING:
    from batch_infer.worker import WorkerSettings

log = logging.getLogger("batch_infer")


class Progress(Protocol):
    """Who is told how a run goes."""

    def start(self, survey: Survey) -> None: ...
    def committed(self, rows: Sequence[ResultRow]) -> None: ...
    def close(self) -> None: ...


def run(
    settings: RunSettings,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    leaves_alone: LeavesAlone = is_done,
) -> Summary:
    """Score the tables into OUT, going on where an earlier run ended. Raises the errors of `batch_infer.errors`."""
    started = time.monotonic()
    settings = rooted(settings)
    with open_tables(settings) as tables:
        card = find_model(settings)
        with outdir.locked(settings.out):
            from batch_infer.engines import local

            job = prepare(settings, tables, card, local.find_device(settings.model.device))
            if settings.overwrite:
                outdir.clear(settings.out)
            elif job.earlier is not None and job.earlier.get("summary") is None:
                outdir.remove_leftovers(settings.out)
            with _logged(settings.out):
                return _Run(job, progress, stop, leaves_alone).go(started)


class _Run:
    """One run on an OUT that it holds the lock of."""

    def __init__(self, job: Job, progress: Progress, stop: Callable[[], bool], leaves_alone: LeavesAlone) -> None:
        self._job, self._progress, self._stop, self._leaves_alone = job, progress, stop, leaves_alone
        self._out = job.settings.out
        self._manifest = Manifest(self._out)
        self._record: Mapping[str, Any] = job.record
        self._summary = Summary()
        self._set_up = 0.0
        self._committed = 0

    def go(self, started: float) -> Summary:
        settings = self._job.settings
        outdir.write_run(self._out, self._record)
        self._set_up = time.monotonic() - started
        with self._manifest.index() as index:
            survey = look_through(self._job, index, self._leaves_alone)
            self._record = {**self._record, "survey": {**asdict(survey), "finished_at": now()}}
            outdir.write_run(self._out, self._record)
            if survey.pending and not self._stop():
                with self._undone_where_refused():
                    self._settle_shapes(survey)
                with closing(self._progress):
                    self._progress.start(survey)
                    self._render(index)
        counts = self._merge(survey)
        remove_other_results(self._out, settings.output)
        self._sum_up(counts, time.monotonic() - started)
        outdir.write_run(self._out, {**self._record, "finished_at": now(), "summary": self._summary.as_dict()})
        return self._summary

    def _settle_shapes(self, survey: Survey) -> None:
        """Find the slots of the sizes that are pending, where that was left to us."""
        if self._job.settings.compute.slots == "auto":
            from batch_infer.engines.probe import Probe

            with Probe() as probe:
                self._use(BatchShapes(self._job, probe).settle(sorted(survey.sizes)))

    @contextmanager
    def _undone_where_refused(self) -> Iterator[None]:
        """Nothing was rendered with these settings: they must not stand in the way of others."""
        try:
            yield
        except UsageError:
            outdir.restore_run(self._out, self._job.earlier)
            raise

    def _use(self, compute: Compute) -> None:
        """Compute like this from here on, and in runs that go on with this one."""
        self._job = replace(self._job, compute=compute)
        self._record = {**self._record, "compute": asdict(compute)}
        outdir.write_run(self._out, self._record)

    def _merge(self, survey: Survey) -> Counts:
        """By the tables, or by the manifest alone where the tables have changed under the run: no result is lost."""
        tables, output = self._job.tables, self._job.settings.output
        if changed := tables.changed():
            log.warning(
                "%s changed or went while the run did, so all that the manifest holds is merged; run again to go by it",
                ", ".join(changed),
            )
            counts = merge_parts(self._manifest, tables.files, self._out, output)
            counts.left = max(0, survey.pending - self._committed) + survey.standing.get("left", 0)
            return counts
        with self._manifest.index() as index:
            return merge(self._job.items(), index, tables.carried, self._out, output)

    def _render(self, index: Index) -> None:
        from batch_infer.engines import local

        lengths: Counter[Size] = Counter()

        def committed(rows: Sequence[ResultRow]) -> None:
            self._committed += len(rows)
            self._summary.rendered += sum(row.status in ("ok", "flagged") for row in rows)
            for row in rows:
                lengths[row.height or 0, row.width or 0] += row.image_bytes or 0
            self._progress.committed(rows)

        before = time.monotonic()
        slots_of = None if self._job.card.driven else self._slots_of
        planned = chunks(pending(self._job.items(), index, self._leaves_alone), slots_of)
        with self._undone_where_refused():
            account = local.render(planned, self._worker(), committed, self._stop)
        self._summary.add_stages(account.stages)
        self._summary.mfu = None if account.mfu is None else round(account.mfu, 4)
        loading = time.monotonic() - before - self._summary.rendering_seconds
        if account.compute == self._job.compute and not account.compute.compiled:
            learn(self._job, account.stages, lengths, self._set_up + loading)
        elif account.compute != self._job.compute:  # it changed on the way, so that its times are of neither
            learn_shapes(self._job, account.compute)
            self._use(account.compute)

    def _slots_of(self, size: Size) -> int:
        return self._job.compute.shape_of(*size).slots

    def _worker(self) -> WorkerSettings:
        from batch_infer.worker import WorkerSettings, worker_name

        job = self._job
        return WorkerSettings(
            name=worker_name(0),
            card=job.card,
            compute=job.compute,
            safety=job.settings.safety,
            output=job.settings.output,
            out=self._out,
            carried=job.tables.carried,
        )

    def _sum_up(self, counts: Counts, seconds: float) -> None:
        self._summary.counts = counts
        self._summary.seconds = seconds
        if (price := self._job.settings.price_per_hour) is not None:
            self._summary.cost = round(price * seconds / 3600, 4)
        self._summary.peak_memory = peak_memory(self._job.compute.device)


@contextmanager
def _logged(out: Path) -> Iterator[None]:
    """Keep what is logged in OUT too."""
    (out / "logs").mkdir(exist_ok=True)
    handler = logging.FileHandler(out / "logs" / "worker-0.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
