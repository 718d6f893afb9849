"""The run: find out what is not done, have it rendered, merge, sum up."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from batch_infer.engines import (
    Engine,
    LaunchedEngine,
    RankInfo,
    Task,
    TaskReport,
    join_launch,
    make_engine,
    read_rank_info,
    remove_rendezvous,
)
from batch_infer.errors import (
    BatchInferError,
    CompilationError,
    DamagedPart,
    Interrupted,
    ServiceError,
    SettingsError,
    UsageError,
)
from batch_infer.jobs import cleanup
from batch_infer.jobs import out as outdir
from batch_infer.jobs.changes import find_changes
from batch_infer.jobs.estimate import Size, learn
from batch_infer.jobs.job import Job, find_model, finishing_overwrite, make_paths_absolute, open_tables, prepare
from batch_infer.jobs.merge import Counts, MissingResults, merge, merge_parts
from batch_infer.jobs.record import at_once, cores
from batch_infer.jobs.recovery import Key, recover, remove_leftovers, set_aside
from batch_infer.jobs.results import remove_other_results
from batch_infer.jobs.run_json import ended_in_order
from batch_infer.jobs.scan import ScanResult, commit_invalid, scan_tables
from batch_infer.jobs.summary import Summary
from batch_infer.jobs.throughput import Throughput
from batch_infer.jobs.tune import BatchShapes, learn_shapes
from batch_infer.main_guard import end_unguarded_process
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.planning import SkipRule, is_done, order_requests, select_pending
from batch_infer.records import ResultRow, utc_now
from batch_infer.settings import Compute, RunSettings
from batch_infer.sinks import make_sink
from batch_infer.stopping import GRACE_SECONDS, StopRequested, deferred
from batch_infer.store import PinnedFolder, log_handler, open_log, path_exists
from batch_infer.worker import WorkerSettings, peak_memory, smallest_batches, sum_stages_by_size

LISTING_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Pauses before the manifest is listed again where it lists too few results."""

log = logging.getLogger("batch_infer")


class Progress(Protocol):
    """Who is told how a run goes."""

    def start(self, survey: ScanResult) -> None:
        """The tables are looked through, and the model is loading."""
        ...

    def ready(self, throughput: Throughput) -> None:
        """The first worker is ready. `throughput` counts from here; each commit is in it before `committed`."""
        ...

    def committed(self, rows: Sequence[ResultRow]) -> None: ...
    def close(self) -> None: ...


def render_tables(
    settings: RunSettings,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    leaves_alone: SkipRule = is_done,
) -> Summary:
    """Score the tables into OUT, going on where an earlier run ended. Raises the errors of `batch_infer.errors`."""
    end_unguarded_process()
    started = time.monotonic()
    settings = make_paths_absolute(settings)
    here = _place(settings)
    if here is not None and here.rank:
        raise SettingsError("this command is not for a launcher: start it once, by itself")
    with open_tables(settings) as tables:
        card = find_model(settings)
        with outdir.locked(settings.out):
            settings = finishing_overwrite(settings)
            remove_rendezvous(settings.out)  # left by a run that was killed
            with make_engine(settings.model.device, settings.compute.processes, here, settings.out) as engine:
                job = prepare(settings, tables, card, engine.find_device())
                with _logged(settings.out):
                    if not settings.overwrite and not ended_in_order(job.earlier):
                        lost = recover(settings.out, Manifest(settings.out), job.record["recover_from"])
                        leaves_alone = _all_but(lost, leaves_alone)
                    return _Run(job, engine, progress, stop, leaves_alone).go(started)


def join_run(settings: RunSettings, stop: Callable[[], bool] = lambda: False) -> bool:
    """Render for the run of rank 0, where a launcher has started this process as another rank; else returns False.

    Raises the errors of `batch_infer.errors`.
    """
    settings = make_paths_absolute(settings)
    here = _place(settings)
    if here is None or not here.rank:
        return False
    log.setLevel(logging.WARNING)  # what there is to say of the settings, rank 0 says
    join_launch(here, settings.model.device, settings.out, find_model(settings), stop)
    return True


def _place(settings: RunSettings) -> RankInfo | None:
    here = read_rank_info()
    if here is not None and settings.compute.processes not in (None, here.world):
        raise SettingsError(
            f"--num-processes {settings.compute.processes}: a launcher has started {here.world}; leave the option out"
        )
    return here


def _all_but(lost: Collection[Key], leaves_alone: SkipRule) -> SkipRule:
    """Leave alone what a command does, but for results whose image is lost."""
    return lambda item, found: item.key not in lost and leaves_alone(item, found)


class _Run:
    """One run on an OUT that it holds the lock of."""

    def __init__(
        self, job: Job, engine: Engine, progress: Progress, stop: Callable[[], bool], leaves_alone: SkipRule
    ) -> None:
        self._job, self._engine, self._progress = job, engine, progress
        self._stop, self._leaves_alone = stop, leaves_alone
        self._out = job.settings.out
        self._held = PinnedFolder.of(self._out)
        self._manifest = Manifest(self._held)
        self._record: Mapping[str, Any] = job.record
        self._summary = Summary()
        self._set_up = 0.0
        self._committed = 0
        self._is_cleared = not (job.settings.overwrite and path_exists(self._out / "run.json"))
        """Whether OUT holds nothing that --overwrite removes. Until then nothing is written there."""
        self._has_invalid = False
        """Whether invalid rows are not committed yet, because OUT was not cleared when they were read."""

    def go(self, started: float) -> Summary:
        self._warn_of_threads()
        self._set_up = time.monotonic() - started
        while True:
            try:
                counts = self._score()
                break
            except DamagedPart as damage:  # where only its other columns are, which are not read until they are merged
                set_aside(damage)
                self._summary, self._committed = Summary(), 0
        self._held.check()
        remove_other_results(self._out, self._job.settings.output)
        self._sum_up(counts, time.monotonic() - started)
        outdir.write_run(self._out, {**self._record, "finished_at": utc_now(), "summary": self._summary.as_dict()})
        log.debug("%d images rendered, %d left; %s has the summary", self._summary.rendered, counts.left, "run.json")
        return self._summary

    def _score(self) -> Counts:
        """Render what is not done, and merge. Raises DamagedPart where its rows are then to be rendered anew."""
        with self._manifest.index(damaged=set_aside) if self._is_cleared else ManifestIndex(()) as index:
            # Before run.json is replaced: where this is interrupted, the next run must compare with the same run.
            changes = find_changes(self._job, index)
            changes.refuse(self._job)
            self._write_record()
            survey = scan_tables(self._job, index, self._leaves_alone, str(changes), writes=self._is_cleared)
            self._has_invalid = not self._is_cleared
            self._write_record(survey={**asdict(survey), "finished_at": utc_now()}, rendering_since=None)
            if survey.pending and not self._stop():
                with self._undone_where_refused():
                    self._settle_shapes(survey)
                with closing(self._progress), ExitStack() as stack:
                    stack.push(partial(self._merge_after_error, survey))
                    self._progress.start(survey)
                    try:
                        self._render(index, survey)
                    except SettingsError as error:
                        if not self._committed:
                            raise
                        raise ServiceError(str(error)) from error  # a key that was valid when the run began
            self._clear()
        self._summary.unfinished = max(0, survey.pending - self._committed)
        return self._merge(survey)

    def _write_record(self, **more: Any) -> None:
        """Add entries to run.json, which stays as it was until OUT is cleared."""
        self._record = {**self._record, **more}
        if self._is_cleared:
            outdir.write_run(self._out, self._record)

    def _clear(self) -> None:
        """Remove what OUT held, for --overwrite: only now, since a model that does not load must cost no images."""
        if self._is_cleared:
            return
        if self._stop():
            raise Interrupted(f"stopped before --overwrite removed what {self._out} holds; run the same command again")
        cleanup.clear(self._out, self._stop)
        remove_leftovers(self._out, self._manifest)
        self._is_cleared = True
        self._write_record()

    def _merge_after_error(
        self, survey: ScanResult, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Merge what is committed where rendering ends with an error, a bug included, without hiding that error."""
        if isinstance(error, Exception) and self._committed:
            try:
                self._merge(survey)
            except BatchInferError as fault:
                self._warn_of_stale_results(fault)

    def _warn_of_threads(self) -> None:
        workers, compute = self._engine.workers, self._job.compute
        if at_once(workers, compute) < workers:
            sentence = "%d workers with %d threads each share %d cores and slow each other down: reduce --threads"
            log.warning(sentence, workers, compute.threads, cores())

    def _settle_shapes(self, survey: ScanResult) -> None:
        """Find the slots of the sizes that are pending, where that was left to us."""
        if self._job.settings.compute.slots == "auto":
            from batch_infer.autotune import Probe

            with Probe() as probe:
                self._use(BatchShapes(self._job, probe).settle(sorted(survey.sizes)))

    @contextmanager
    def _undone_where_refused(self) -> Iterator[None]:
        """Nothing was rendered with these settings: they must not stand in the way of others."""
        try:
            yield
        except UsageError:
            if self._is_cleared and not self._committed:
                remove_leftovers(self._out, self._manifest)
                outdir.restore_run(self._out, self._job.earlier)
            raise

    def _use(self, compute: Compute) -> None:
        """Compute like this from here on, and in runs that go on with this one."""
        self._job = replace(self._job, compute=compute)
        self._write_record(compute=asdict(compute))

    @deferred(GRACE_SECONDS)
    def _merge(self, survey: ScanResult) -> Counts:
        """Merge, and list the manifest again where it lists fewer results than this run knows of.

        File systems on a network, NFS and FUSE among them, may show a directory as it was up to a minute ago.
        """
        try:
            if self._has_invalid and not self._job.tables.changed_files():
                commit_invalid(self._job)
                self._has_invalid = False
            for seconds in LISTING_SECONDS:
                with suppress(MissingResults):
                    return self._merge_once(survey)
                time.sleep(seconds)
            return self._merge_once(survey)
        except StopRequested:
            self._warn_of_stale_results("there was no time to merge")
            raise

    def _warn_of_stale_results(self, reason: object) -> None:
        """Warn that results.* lack rows that this run has committed."""
        path = self._out / "results.parquet"
        log.warning("%s was not updated (%s): run `batch-infer merge %s`", path, reason, self._out)

    def _merge_once(self, survey: ScanResult) -> Counts:
        """By the tables, or by the manifest alone where the tables have changed under the run: no result is lost."""
        self._held.check()
        left = max(0, survey.pending - self._committed) + survey.standing.get("left", 0)
        left += survey.invalid * self._has_invalid
        least = survey.total - left - survey.unsettled
        tables, output = self._job.tables, self._job.settings.output
        if changed := tables.changed_files():
            log.warning(
                "%s changed or disappeared during the run, so results.* hold all that the manifest does; run again to "
                "merge by the tables as they are now",
                ", ".join(changed),
            )
            counts = merge_parts(self._manifest, tables.files, self._out, output, least)
            counts.left = left
            return counts
        with self._manifest.index() as index:
            return merge(self._job.items(index), index, tables.carried, self._out, output, least)

    def _in_flight(self, survey: ScanResult) -> int:
        """Return how many results the workers have under way together, if each row has guidance and takes two slots."""
        slots = max(self._slots_of(size) for size in survey.sizes)
        return min(survey.pending, max(1, slots // 2))

    def _render(self, index: ManifestIndex, survey: ScanResult) -> None:
        lengths: Counter[Size] = Counter()

        throughput: Throughput | None = None

        def ready() -> None:
            nonlocal throughput
            self._clear()
            in_flight = self._in_flight(survey)
            throughput = Throughput(in_flight=in_flight)
            self._write_record(rendering_since=utc_now(), in_flight=in_flight)
            self._progress.ready(throughput)

        def committed(rows: Sequence[ResultRow]) -> None:
            self._committed += len(rows)
            if throughput is not None:
                throughput.add(rows)
                self._summary.rendered, self._summary.rendering_seconds = throughput.rendered, throughput.seconds
            for row in rows:
                lengths[row.height or 0, row.width or 0] += row.image_bytes or 0
            self._progress.committed(rows)

        before = time.monotonic()
        with self._undone_where_refused():
            work = self._render_compiled(index, survey, committed, ready)
            if work is None:
                work = self._engine.render(self._task(index, survey), committed, self._stop, ready)
        self._summary.add(work)
        if work.lost_remote_worker:  # the next run removes what they leave
            self._write_record(has_strays=True)
        elif work.deaths:
            remove_leftovers(self._out, self._manifest)
        self._learn(work, lengths, self._set_up + time.monotonic() - before - work.seconds)

    def _render_compiled(
        self,
        index: ManifestIndex,
        survey: ScanResult,
        committed: Callable[[Sequence[ResultRow]], None],
        ready: Callable[[], None],
    ) -> TaskReport | None:
        """Render, or return None once compiling has failed and the run is set to do without it.

        The caller renders again after this has returned: within the except block, the error's traceback would keep the
        first model in memory.
        """
        try:
            return self._engine.render(self._task(index, survey), committed, self._stop, ready)
        except CompilationError as error:
            self._stop_compiling(error, survey)
            return None

    def _task(self, index: ManifestIndex, survey: ScanResult) -> Task:
        slots_of = None if self._job.card.uses_pipeline_call else self._slots_of
        new = select_pending(self._job.items(index), index, self._leaves_alone)
        collisions = make_sink(self._out).collisions(index)
        requests = order_requests((collisions.mark(request, request.replaces) for request in new), slots_of)
        return Task(requests, survey.pending, self._worker())

    def _stop_compiling(self, error: CompilationError, survey: ScanResult) -> None:
        """Continue without torch.compile in all workers. Raises CompilationError where the user must decide.

        Compiled and uncompiled networks give different bytes. So this is done only while OUT holds no image,
        and neither for --compile nor for a launcher, whose other ranks have ended.
        """
        if self._committed or survey.standing.get("ok") or survey.standing.get("flagged"):
            raise CompilationError(
                f"{error}, but the images that {self._out} already holds were compiled: to have all alike, "
                "add --overwrite or give another --out"
            ) from error
        if self._job.settings.compute.compiled or isinstance(self._engine, LaunchedEngine):
            raise error
        log.warning("%s; no image is rendered yet, so this run continues without it", error)
        self._use(replace(self._job.compute, compiled=False))

    def _learn(self, work: TaskReport, lengths: Mapping[Size, int], start: float) -> None:
        """Remember what it took, and how it had to compute where that has changed on the way."""
        computes = [account.compute for account in work.worker_reports]
        if all(compute == self._job.compute for compute in computes):
            if not self._job.compute.compiled:
                learn(self._job, sum_stages_by_size(work.worker_reports), lengths, start)
        else:
            compute = smallest_batches(computes)
            learn_shapes(self._job, compute)
            self._use(compute)

    def _slots_of(self, size: Size) -> int:
        return self._job.compute.shape_of(*size).slots * self._engine.workers

    def _worker(self) -> WorkerSettings:
        job = self._job
        return WorkerSettings(
            card=job.card,
            compute=job.compute,
            safety=job.settings.safety.split_among(self._engine.workers),
            output=job.settings.output,
            out=self._held,
            carried=job.tables.carried,
            run=job.number,
        )

    def _sum_up(self, counts: Counts, seconds: float) -> None:
        self._summary.counts = counts
        self._summary.seconds = seconds
        if (price := self._job.settings.price_per_hour) is not None:
            self._summary.cost = round(price * seconds / 3600, 4)
        for name, held in peak_memory("cpu").items():
            self._summary.peak_memory[name] = max(held, self._summary.peak_memory.get(name, 0))


@contextmanager
def _logged(out: Path) -> Iterator[None]:
    """Keep what is logged in OUT too, and how it ended."""
    with open_log(out / "logs" / "run.log") as file:
        handler = log_handler(file)
        log.addHandler(handler)
        try:
            yield
        finally:
            log.removeHandler(handler)
