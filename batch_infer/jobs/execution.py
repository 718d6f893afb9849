"""Execute a run while OUT is locked: scan the tables, render pending rows, merge the results and summarise."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from functools import partial
from types import TracebackType
from typing import Protocol

from batch_infer.engines import Engine, LaunchedEngine, Task, TaskReport
from batch_infer.errors import BatchInferError, CompilationError, DamagedPartError, ServiceError, SettingsError
from batch_infer.jobs.estimates import BatchShapes, Size, remember_rates, remember_shapes
from batch_infer.jobs.job import Job, count_cores, count_parallel
from batch_infer.jobs.merge import MissingResultsError, merge, merge_parts
from batch_infer.jobs.recovery import remove_leftovers, set_aside
from batch_infer.jobs.results import remove_other_results
from batch_infer.jobs.run_folder import RunFolder
from batch_infer.jobs.scan import ScanResult, commit_invalid, find_changes, scan_tables
from batch_infer.jobs.summary import Counts, Summary, Throughput
from batch_infer.manifest import ManifestIndex
from batch_infer.planning import SkipRule, order_requests, select_pending
from batch_infer.records import ResultRow, utc_now
from batch_infer.settings import Compute
from batch_infer.sinks import make_sink
from batch_infer.stopping import GRACE_SECONDS, StopRequested, deferred
from batch_infer.worker import WorkerSettings, read_peak_memory, sum_stages_by_size, take_smallest_batches

LISTING_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds to wait before each new listing of a manifest that lists too few results."""

log = logging.getLogger("batch_infer")


class Progress(Protocol):
    """Receives the events of a run."""

    def start(self, scan: ScanResult) -> None:
        """Called when the tables are scanned and the model starts to load."""
        ...

    def ready(self, throughput: Throughput) -> None:
        """Called when the first worker is ready. `throughput` is updated before each call of `committed`."""
        ...

    def committed(self, rows: Sequence[ResultRow]) -> None: ...
    def close(self) -> None: ...


class _Commits:
    """Counts what the workers commit during this run."""

    def __init__(self) -> None:
        self.results = 0
        self.bytes_by_size: Counter[Size] = Counter()
        self.throughput: Throughput | None = None
        """None until the first worker is ready."""

    def add(self, rows: Sequence[ResultRow]) -> None:
        self.results += len(rows)
        if self.throughput is not None:
            self.throughput.add(rows)
        for row in rows:
            self.bytes_by_size[row.height or 0, row.width or 0] += row.image_bytes or 0


class RunExecution:
    """Runs a job on an engine. `_has_invalid` is true while invalid rows wait for --overwrite to clear OUT."""

    def __init__(self, job: Job, engine: Engine, progress: Progress, stop: Callable[[], bool], skip: SkipRule) -> None:
        self._job, self._engine, self._progress, self._stop, self._skip = job, engine, progress, stop, skip
        self._folder = RunFolder(job, stop)
        self._summary, self._commits = Summary(), _Commits()
        self._has_invalid = False
        self._setup_seconds = 0.0

    def execute(self, started: float) -> Summary:
        """Execute the run. `started` is the `time.monotonic` reading at the start of the command."""
        self._warn_about_threads()
        self._setup_seconds = time.monotonic() - started
        while True:
            try:
                counts = self._scan_render_merge()
                break
            except DamagedPartError as damage:  # in carried columns, which only the merge reads
                set_aside(damage)
                self._summary, self._commits = Summary(), _Commits()
        self._folder.pinned.check()
        remove_other_results(self._folder.out, self._job.settings.output)
        self._summarise(counts, time.monotonic() - started)
        self._folder.update_record(finished_at=utc_now(), summary=self._summary.as_dict())
        log.debug("%d images rendered, %d left; run.json has the summary", self._summary.rendered, counts.remaining)
        return self._summary

    def _warn_about_threads(self) -> None:
        workers, compute = self._engine.worker_count, self._job.compute
        if count_parallel(workers, compute) < workers:
            message = "%d workers with %d threads each share %d cores and slow each other down: reduce --threads"
            log.warning(message, workers, compute.threads, count_cores())

    def _scan_render_merge(self) -> Counts:
        """Scan, render pending rows and merge. Raises DamagedPartError if a part's rows must be rendered again."""
        with self._folder.index() as index:
            scan = self._scan(index)
            if scan.pending and not self._stop():
                with self._folder.restored_on_usage_error(self._has_commits):
                    self._choose_slots(scan)
                with closing(self._progress), ExitStack() as stack:
                    stack.push(partial(self._merge_after_error, scan))
                    self._progress.start(scan)
                    try:
                        self._render(index, scan)
                    except SettingsError as error:
                        if not self._commits.results:
                            raise
                        raise ServiceError(str(error)) from error  # the key was valid when the run began
            self._folder.clear()
        self._summary.unfinished = max(0, scan.pending - self._commits.results)
        return self._merge(scan)

    def _scan(self, index: ManifestIndex) -> ScanResult:
        # Compare before replacing run.json: after an interruption, the next run must compare with the same earlier run.
        changes = find_changes(self._job, index)
        changes.refuse(self._job)
        self._folder.update_record()
        scan = scan_tables(self._job, index, self._skip, str(changes), writes=self._folder.is_cleared)
        self._has_invalid = not self._folder.is_cleared
        self._folder.update_record(survey={**scan.as_dict(), "finished_at": utc_now()}, rendering_since=None)
        return scan

    def _summarise(self, counts: Counts, seconds: float) -> None:
        summary = self._summary
        summary.counts, summary.seconds = counts, seconds
        if (price := self._job.settings.price_per_hour) is not None:
            summary.cost = round(price * seconds / 3600, 4)
        summary.add_peak_memory(read_peak_memory("cpu"))

    # Rendering

    def _has_commits(self) -> bool:
        return self._commits.results > 0

    def _choose_slots(self, scan: ScanResult) -> None:
        """With --slots auto, measure or load the slots for the pending sizes."""
        if self._job.settings.compute.slots == "auto":
            from batch_infer.autotune import Probe

            with Probe() as probe:
                self._set_compute(BatchShapes(self._job, probe).choose(sorted(scan.sizes)))

    def _set_compute(self, compute: Compute) -> None:
        """Use these settings from now on, and in runs that continue this one."""
        self._job = replace(self._job, compute=compute)
        self._folder.update_record(compute=asdict(compute))

    def _render(self, index: ManifestIndex, scan: ScanResult) -> None:
        started = time.monotonic()
        with self._folder.restored_on_usage_error(self._has_commits):
            report = self._render_compiled(index, scan)
            if report is None:
                report = self._render_once(index, scan)
        if (throughput := self._commits.throughput) is not None:
            self._summary.rendered, self._summary.rendering_seconds = throughput.rendered, throughput.seconds
        self._summary.add(report)
        if report.lost_remote_worker:  # the next run removes that worker's files
            self._folder.update_record(has_strays=True)
        elif report.deaths:
            remove_leftovers(self._folder.out)
        self._save_measurements(report, self._setup_seconds + time.monotonic() - started - report.seconds)

    def _render_compiled(self, index: ManifestIndex, scan: ScanResult) -> TaskReport | None:
        """Render. If compiling fails, disable torch.compile and return None.

        The caller then renders again: inside the except block, the traceback would keep the first model in memory.
        """
        try:
            return self._render_once(index, scan)
        except CompilationError as error:
            self._disable_compiling(error, scan)
            return None

    def _render_once(self, index: ManifestIndex, scan: ScanResult) -> TaskReport:
        slots_of = None if self._job.card.uses_pipeline_call else self._slots_of
        new = select_pending(self._job.items(index), index, self._skip)
        collisions = make_sink(self._folder.out).collisions(index)
        requests = order_requests((collisions.mark(request, request.replaces) for request in new), slots_of)
        task = Task(requests, scan.pending, self._worker_settings())
        return self._engine.render(task, self._on_commit, self._stop, partial(self._on_ready, scan))

    def _on_ready(self, scan: ScanResult) -> None:
        self._folder.clear()
        # Number of results in progress at once if every row uses guidance, which takes two slots.
        slots = max(self._slots_of(size) for size in scan.sizes)
        in_flight = min(scan.pending, max(1, slots // 2))
        throughput = self._commits.throughput = Throughput(in_flight=in_flight)
        self._folder.update_record(rendering_since=utc_now(), in_flight=in_flight)
        self._progress.ready(throughput)

    def _on_commit(self, rows: Sequence[ResultRow]) -> None:
        self._commits.add(rows)
        self._progress.committed(rows)

    def _slots_of(self, size: Size) -> int:
        return self._job.compute.shape_of(*size).slots * self._engine.worker_count

    def _worker_settings(self) -> WorkerSettings:
        job = self._job
        return WorkerSettings(
            card=job.card,
            compute=job.compute,
            safety=job.settings.safety.split_among(self._engine.worker_count),
            output=job.settings.output,
            out=self._folder.pinned,
            carried=job.tables.carried,
            run=job.number,
        )

    def _disable_compiling(self, error: CompilationError, scan: ScanResult) -> None:
        """Disable torch.compile in all workers. Raises CompilationError if the user must decide.

        Compiled and uncompiled networks produce different bytes, so the run continues only while OUT holds no image.
        It never continues with --compile, or under a launcher, whose other ranks have already exited.
        """
        if self._commits.results or scan.skipped.get("ok") or scan.skipped.get("flagged"):
            raise CompilationError(
                f"{error}, but the images that {self._folder.out} already holds were compiled: to have all alike, "
                "add --overwrite or give another --out"
            ) from error
        if self._job.settings.compute.compiled or isinstance(self._engine, LaunchedEngine):
            raise error
        log.warning("%s; no image is rendered yet, so this run continues without it", error)
        self._set_compute(replace(self._job.compute, compiled=False))

    def _save_measurements(self, report: TaskReport, startup_seconds: float) -> None:
        """Save the measured rates for estimates, or batch sizes if they were halved after running out of memory."""
        computes = [worker.compute for worker in report.worker_reports]
        if all(compute == self._job.compute for compute in computes):
            if not self._job.compute.compiled:
                stages = sum_stages_by_size(report.worker_reports)
                remember_rates(self._job, stages, self._commits.bytes_by_size, startup_seconds)
        else:
            compute = take_smallest_batches(computes)
            remember_shapes(self._job, compute)
            self._set_compute(compute)

    # Merging

    @deferred(GRACE_SECONDS)
    def _merge(self, scan: ScanResult) -> Counts:
        """Merge, and list the manifest again while it lists fewer results than expected.

        Network file systems such as NFS and FUSE may show a directory's state from up to a minute ago.
        """
        try:
            if self._has_invalid and not self._job.tables.changed_files():
                commit_invalid(self._job)
                self._has_invalid = False
            for seconds in LISTING_SECONDS:
                with suppress(MissingResultsError):
                    return self._merge_once(scan)
                time.sleep(seconds)
            return self._merge_once(scan)
        except StopRequested:
            self._warn_about_stale_results("there was no time to merge")
            raise

    def _merge_once(self, scan: ScanResult) -> Counts:
        """Merge in table order, or from the manifest alone if the tables changed during the run."""
        self._folder.pinned.check()
        remaining = max(0, scan.pending - self._commits.results) + scan.skipped.get("left", 0)
        if self._has_invalid:
            remaining += scan.invalid
        least = scan.total - remaining - scan.uncommitted
        tables, output = self._job.tables, self._job.settings.output
        if changed := tables.changed_files():
            log.warning(
                "%s changed or disappeared during the run, so results.* hold all that the manifest does; run again to "
                "merge by the tables as they are now",
                ", ".join(changed),
            )
            counts = merge_parts(self._folder.manifest, tables.files, self._folder.out, output, least)
            counts.remaining = remaining
            return counts
        with self._folder.manifest.index() as index:
            return merge(self._job.items(index), index, tables.carried, self._folder.out, output, least)

    def _merge_after_error(
        self,
        scan: ScanResult,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        """Merge committed results after a rendering error, without hiding that error."""
        if isinstance(error, Exception) and self._commits.results:
            try:
                self._merge(scan)
            except BatchInferError as merge_error:
                self._warn_about_stale_results(merge_error)

    def _warn_about_stale_results(self, reason: object) -> None:
        """Warn that results.* lack rows committed by this run."""
        path = self._folder.out / "results.parquet"
        log.warning("%s was not updated (%s): run `batch-infer merge %s`", path, reason, self._folder.out)
