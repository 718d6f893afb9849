"""Execute a run in a locked OUT: scan the tables, render pending rows, merge results and summarise."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial

from batch_infer.engines import Engine, LaunchedEngine, Task, TaskReport
from batch_infer.errors import BatchInferError, CompilationError, ServiceError, SettingsError, UsageError
from batch_infer.jobs.compaction import Compaction
from batch_infer.jobs.compute import count_cores, count_parallel
from batch_infer.jobs.estimates import BatchShapes, Size, remember_rates, remember_shapes
from batch_infer.jobs.finished_run import recognise_finished_run
from batch_infer.jobs.job import Job
from batch_infer.jobs.merge import MissingResultsError, merge_parts, merge_tables
from batch_infer.jobs.progress import LiveFigures, Progress
from batch_infer.jobs.recovery import remove_leftovers, retry_without_damaged_parts, set_aside
from batch_infer.jobs.run_folder import RunFolder
from batch_infer.jobs.run_json import ScanRecord, parse_record
from batch_infer.jobs.scan import ScanResult, commit_invalid, find_changes, scan_tables
from batch_infer.jobs.selection import ALL_UNFINISHED, RowSelection
from batch_infer.jobs.summary import Counts, Summary, Throughput
from batch_infer.manifest import ManifestIndex
from batch_infer.planning import order_requests, select_pending
from batch_infer.records import ResultRow, utc_now
from batch_infer.settings import Compute
from batch_infer.sinks import make_sink
from batch_infer.stopping import GRACE_SECONDS, StopRequested, deferred
from batch_infer.terminal import quote_command
from batch_infer.worker import WorkerSettings, read_peak_memory, sum_stages_by_size, take_smallest_batches

LISTING_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds to wait before each new listing of a manifest with too few results."""

log = logging.getLogger("batch_infer")


class RunExecution:
    """Runs a job on an engine."""

    def __init__(
        self, job: Job, engine: Engine, progress: Progress, stop: Callable[[], bool], selection: RowSelection
    ) -> None:
        self._job, self._engine, self._progress, self._stop = job, engine, progress, stop
        self._selection = selection
        self._store, self._folder = job.store, RunFolder(job, stop)
        self._has_uncommitted_invalid = False
        """Whether invalid rows must still be committed, because OUT was not cleared when the tables were scanned."""
        self._setup_seconds = 0.0
        self._summary = Summary()
        self._scan_record: ScanRecord | None = None
        self._compaction = Compaction(self._folder.manifest, job.record["recover_from"])
        self._throughput: Throughput | None = None  # None until the first worker is ready
        self._figures = LiveFigures(self._folder)
        self._bytes_by_size: Counter[Size] = Counter()

    @property
    def _committed(self) -> int:
        """Number of results that the workers have committed since the last scan."""
        return self._throughput.committed if self._throughput else 0

    def execute(self, started: float) -> Summary:
        """Execute the run. `started` is the value of `time.monotonic` when preparation began."""
        workers, threads = self._engine.worker_count, self._job.compute.threads
        if count_parallel(workers, self._job) < workers:
            message = "%d workers with %d threads each share %d cores and slow each other down: reduce --threads"
            log.warning(message, workers, threads, count_cores())
        self._setup_seconds = time.monotonic() - started
        with closing(self._compaction):
            counts = retry_without_damaged_parts(self._scan_render_merge, partial(set_aside, self._store))
        self._folder.remove_old_files(counts, has_committed=self._committed > 0)
        summary, price = self._summary, self._job.settings.price_per_hour
        summary.counts, summary.seconds = counts, time.monotonic() - started
        summary.cost = None if price is None else round(price * summary.seconds / 3600, 4)
        summary.add_peak_memory(read_peak_memory("cpu"))
        self._folder.update_record(finished_at=utc_now(), summary=summary.as_dict())
        log.debug("%d images rendered, %d left; run.json has the summary", summary.rendered, summary.counts.remaining)
        return summary

    def _scan_render_merge(self) -> Counts:
        """Scan, render pending rows and merge.

        Raises DamagedPartError if a part is damaged in a place that the scan does not read, such as a carried column.
        The caller then sets the part aside and calls this again, so that its rows are rendered again.
        """
        self._summary, self._throughput = Summary(), None
        self._bytes_by_size.clear()
        digest = self._job.tables.compute_digest(self._job.rules)
        if self._selection == ALL_UNFINISHED and (finished := recognise_finished_run(self._job, digest)) is not None:
            scan, counts = finished
            for notice in self._job.tables.notices:
                log.warning("%s", notice)
            self._record_scan(scan, digest)
            return counts
        with self._folder.index() as index:
            scan = self._scan(index, digest)
            if scan.pending and not self._stop():
                try:
                    self._render(index, scan)
                except Exception as error:
                    if self._committed:
                        self._merge_after_error(scan)
                        if isinstance(error, SettingsError):
                            raise ServiceError(str(error)) from error  # e.g. the key expired: a new run may continue
                    elif isinstance(error, UsageError):
                        self._folder.restore_record()
                    raise
            self._folder.clear()
        self._summary.unfinished = max(0, scan.pending - self._committed)
        return self._merge(scan)

    def _scan(self, index: ManifestIndex, tables_digest: str | None) -> ScanResult:
        # Compare before replacing run.json, so that after an interruption the next run compares with the same record.
        changes = find_changes(self._job, index)
        changes.refuse(self._job)
        self._folder.update_record()
        scan = scan_tables(self._job, index, self._selection, str(changes), writes=self._folder.is_cleared)
        try:
            self._selection.check(index)
        except UsageError:
            self._folder.restore_record()
            raise
        self._has_uncommitted_invalid = not self._folder.is_cleared
        self._record_scan(scan, tables_digest)
        return scan

    def _record_scan(self, scan: ScanResult, tables_digest: str | None) -> None:
        """Add a finished scan of the tables to run.json, with their digest unless they have changed in the meantime."""
        if self._job.tables.changed_files():
            tables_digest = None
        earlier = parse_record(self._job.earlier or {}).survey
        since = earlier.tables_since if earlier and earlier.tables_digest == tables_digest else self._job.number
        self._scan_record = ScanRecord(utc_now(), scan.total, tables_digest=tables_digest, tables_since=since)
        added = {name: getattr(self._scan_record, name) for name in ("finished_at", "tables_digest", "tables_since")}
        self._folder.update_record(survey={**scan.as_dict(), **added}, rendering_since=None)

    def _set_compute(self, compute: Compute) -> None:
        """Use these settings from now on, and in runs that continue this one."""
        self._job = replace(self._job, compute=compute)
        self._folder.update_record(compute=asdict(compute))

    def _render(self, index: ManifestIndex, scan: ScanResult) -> None:
        """Render the pending rows. With --slots auto, choose their batch sizes first."""
        if self._job.settings.compute.slots == "auto":
            from batch_infer.autotune import Probe

            with Probe() as probe:
                self._set_compute(BatchShapes(self._job, probe).choose(sorted(scan.sizes)))
        with closing(self._progress):
            self._progress.start(scan)
            started = time.monotonic()
            report = None
            while report is None:
                try:
                    report = self._render_once(index, scan)
                except CompilationError as error:
                    self._disable_compiling(error, scan)
                # Retry outside the except block, whose traceback would keep the first model in memory.
            self._conclude(report, self._setup_seconds + time.monotonic() - started - report.seconds)

    def _conclude(self, report: TaskReport, startup_seconds: float) -> None:
        """Add a report to the summary, clean up after dead local workers, and save batch sizes or rates for later."""
        if self._throughput is not None:
            self._summary.set_speed(self._throughput)
        self._summary.add(report)
        if report.lost_remote_worker:  # it may still be writing, so leave its files to the next run
            self._folder.update_record(has_strays=True)
        elif report.deaths:
            self._compaction.wait()  # its temporary file is no leftover
            remove_leftovers(self._store)
        computes = [worker.compute for worker in report.worker_reports]
        if any(compute != self._job.compute for compute in computes):  # halved after running out of memory
            compute = take_smallest_batches(computes)
            remember_shapes(self._job, compute)
            self._set_compute(compute)
        elif not self._job.compute.compiled:
            stages = sum_stages_by_size(report.worker_reports)
            remember_rates(self._job, stages, self._bytes_by_size, startup_seconds)

    def _render_once(self, index: ManifestIndex, scan: ScanResult) -> TaskReport:
        job = self._job
        settings = WorkerSettings(
            card=job.card,
            compute=job.compute,
            safety=job.settings.safety.split_among(self._engine.worker_count),
            output=job.settings.output,
            out=self._store.address,
            carried=job.tables.carried,
            run=job.number,
        )
        pending = select_pending(job.items(index), index, self._selection.skip)
        collisions = make_sink(self._store).collisions(index)
        marked = (collisions.mark(request, request.replaces) for request in pending)
        requests = order_requests(marked, self._slots_of)
        task = Task(requests, scan.pending, settings, self._figures.report)
        return self._engine.render(task, self._on_commit, self._stop, partial(self._on_ready, scan))

    def _on_ready(self, scan: ScanResult) -> None:
        self._folder.clear()
        # Estimate how many results are in progress at a time as if every row used guidance, which takes two slots.
        slots = max(self._slots_of(size) for size in scan.sizes)
        in_flight = min(scan.pending, max(1, slots // 2))
        self._throughput = Throughput(in_flight=in_flight)
        self._figures.start(self._throughput)
        self._folder.update_record(rendering_since=utc_now(), in_flight=in_flight)
        self._progress.ready(self._throughput)

    def _on_commit(self, rows: Sequence[ResultRow]) -> None:
        if self._throughput is not None:
            self._throughput.add(rows)
        self._compaction.count_part()
        self._folder.count_shards(rows)
        self._figures.add(rows)
        for row in rows:
            self._bytes_by_size[row.height or 0, row.width or 0] += row.image_bytes or 0
        self._progress.committed(rows)

    def _slots_of(self, size: Size) -> int:
        return self._job.compute.shape_of(*size).slots * self._engine.worker_count

    def _disable_compiling(self, error: CompilationError, scan: ScanResult) -> None:
        """Disable torch.compile in all workers, or raise CompilationError if the run cannot continue without it.

        Compiled and uncompiled networks produce different bytes, so no image of these tables may exist yet. A run with
        --compile does not continue, nor does a run under a launcher, whose other ranks have already exited.
        """
        if self._committed or scan.skipped.get("ok") or scan.skipped.get("flagged"):
            raise CompilationError(
                f"{error}, but images in {self._store.location} were rendered with torch.compile, and images rendered "
                "without it would differ: add --overwrite or give another --out"
            ) from error
        is_required = self._job.settings.compute.compiled or not self._job.compute.compiled
        if is_required or isinstance(self._engine, LaunchedEngine):
            raise error
        log.warning("%s; no image has been rendered yet, so this run continues without it", error)
        self._set_compute(replace(self._job.compute, compiled=False))

    @deferred(GRACE_SECONDS)
    def _merge(self, scan: ScanResult) -> Counts:
        """Commit invalid rows if the scan could not, and merge.

        While the manifest lists fewer results than expected, list it again for about a minute, because network file
        systems such as NFS may list a directory as it was up to a minute ago.
        """
        try:
            if self._stop():
                self._compaction.wait()
            else:
                self._compaction.finish()
            if self._has_uncommitted_invalid and not self._job.tables.changed_files():
                commit_invalid(self._job)
                self._has_uncommitted_invalid = False
            for seconds in LISTING_SECONDS:
                with suppress(MissingResultsError):
                    return self._merge_once(scan)
                time.sleep(seconds)
            return self._merge_once(scan)
        except StopRequested:
            self._warn_about_stale_results("there was no time to merge")
            raise

    def _merge_once(self, scan: ScanResult) -> Counts:
        """Merge in table order. If the tables changed during the run, merge all results in the manifest instead."""
        self._store.check()
        remaining = max(0, scan.pending - self._committed) + scan.skipped.get("left", 0)
        if self._has_uncommitted_invalid:
            remaining += scan.invalid
        min_results = scan.total - remaining - scan.uncommitted
        tables, output = self._job.tables, self._job.settings.output
        if changed := tables.changed_files():
            log.warning(
                "%s changed or disappeared during the run, so results.* contain all results in the manifest; run again "
                "to merge only the results of the current tables",
                ", ".join(changed),
            )
            self._record_scan(scan, None)
            counts = merge_parts(self._store, tables.files, output, min_results)
            counts.remaining = remaining
            return counts
        return merge_tables(tables, self._job.rules, self._scan_record, self._store, output, min_results)

    def _merge_after_error(self, scan: ScanResult) -> None:
        """Merge committed results after a rendering error, without hiding that error."""
        try:
            self._merge(scan)
        except BatchInferError as error:
            self._warn_about_stale_results(error)

    def _warn_about_stale_results(self, reason: object) -> None:
        """Warn that results.* do not contain all results of this run."""
        path, merge = self._store.locate("results.parquet"), quote_command("merge", self._store.location)
        log.warning("%s was not updated (%s): run %s", path, reason, merge)
