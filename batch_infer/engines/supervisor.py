"""Send rows to workers, report the rows that they commit, and replace workers that die or hang."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from threading import Event

from batch_infer.engines import messages
from batch_infer.engines.handle import WorkerCrashError, WorkerHandle, last_line
from batch_infer.engines.ledger import MAX_DEATHS, Chunk, Ledger
from batch_infer.engines.protocol import OnCommit, OnReady, Stop, Task, TaskReport, WorkersLostError, WorkerSource
from batch_infer.errors import ModelError, RetryableError, SettingsError
from batch_infer.records import PromptRequest
from batch_infer.settings import Device
from batch_infer.stopping import deferred
from batch_infer.worker import WorkerReport, commit_failed

POLL_SECONDS = 0.2
MAX_STARTS = 2
"""The run ends after a required worker died this many times in a row, or sent an error, while loading the model.

Any worker that has died this many times in a row without a commit gets rows to retry before new rows.
"""
SUSPENDED_SECONDS = 5.0
"""If one turn of the loop takes longer than this, this process is assumed to have been suspended."""
MAX_FAILURES = 10
"""A worker is not restarted after it has died this many times in a row without a commit."""

log = logging.getLogger("batch_infer")


class Supervisor:
    """Supervises the workers of one task."""

    def __init__(self, task: Task, source: WorkerSource, on_commit: OnCommit, on_ready: OnReady = lambda: None) -> None:
        self._task, self._source, self._on_commit, self._on_ready = task, source, on_commit, on_ready
        self._ledger = Ledger(task.requests, task.expected_count, source.worker_count)
        self._workers: dict[int, WorkerHandle] = {}
        self._inbox_event = Event()
        self._reports: list[WorkerReport] = []
        self._failures: Counter[int] = Counter()
        """Deaths in a row without a commit, by rank."""
        self._deaths, self._lost_remote_worker, self._is_stopping = 0, False, False
        self._model_messages: set[str] = set()
        self._error: Exception | None = None
        self._rendering_since: float | None = None

    def run(self, stop: Stop) -> TaskReport:
        """Implement `Engine.render`. Raises the same errors, and WorkerCrashError."""
        for worker in self._source.start(self._task.expected_count):
            worker.is_required = True
            self._add(worker)
        self._ledger.prefetch()
        last_turn = time.monotonic()
        with deferred():
            while self._workers or self._is_waiting():
                if stop():
                    self._stop()
                last_turn = self._reset_after_suspension(last_turn)
                self._receive_arrivals()
                self._inbox_event.wait(POLL_SECONDS)
                self._inbox_event.clear()
                for worker in list(self._workers.values()):
                    self._receive(worker)
                self._kill_silent_workers()
                self._hand_out_rows()
        if self._error is not None:
            raise self._error
        return self._make_report()

    def _make_report(self) -> TaskReport:
        """Return the current state of the task."""
        active = [worker.report for worker in self._workers.values() if worker.report is not None]
        seconds = time.monotonic() - self._rendering_since if self._rendering_since is not None else 0.0
        workers = self._source.worker_count
        return TaskReport([*self._reports, *active], seconds, workers, self._deaths, self._lost_remote_worker)

    def _is_waiting(self) -> bool:
        """Return whether workers are pending that would render rows."""
        return not self._is_stopping and not self._ledger.is_done and bool(self._source.pending())

    def _receive_arrivals(self) -> None:
        for worker in self._source.arrivals():
            self._add(worker)
        for rank, cause in self._source.failed_starts():
            if not self._is_stopping:
                self._failures[rank] += 1
                log.warning("worker %d ended before it connected (%s)", rank, cause)
                self._restart(rank, WorkersLostError(cause))

    def _reset_after_suspension(self, last_turn: float) -> float:
        """Reset the silence of all workers if this process was suspended. Return the time of this turn."""
        now = time.monotonic()
        if now - last_turn > SUSPENDED_SECONDS:
            for worker in self._workers.values():
                worker.reset_silence()
        return now

    def _add(self, worker: WorkerHandle) -> None:
        if self._is_stopping:
            worker.send(messages.StopTask())
            return
        worker.reset_silence()  # it may have waited for its task while this process scanned tables
        self._workers[worker.rank] = worker
        worker.inbox_event = self._inbox_event
        self._inbox_event.set()  # messages may already have arrived
        worker.send(messages.StartTask(self._task.settings))

    def _remove(self, worker: WorkerHandle, *, has_died: bool = False) -> None:
        if has_died:  # counted, since it may have left temporary files in OUT
            self._deaths += 1
            self._lost_remote_worker |= not worker.is_child
        if self._workers.get(worker.rank) is worker:
            del self._workers[worker.rank]
            if worker.report is not None:
                self._reports.append(worker.report)
        if has_died:
            self._task.on_report(self._make_report())

    def _stop(self) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        for worker in list(self._workers.values()):
            worker.send(messages.StopTask())
            worker.reset_silence()
            if not worker.is_loaded:  # loading may take minutes, and there is nothing to commit
                worker.kill()
                self._remove(worker)

    def _receive(self, worker: WorkerHandle) -> None:
        try:
            for message in worker.receive():
                self._handle(worker, message)
        except EOFError:
            if self._workers.get(worker.rank) is not worker:  # it has been removed
                return
            if not self._is_stopping:
                self._replace(worker, worker.describe_exit())
                return
            if worker.error is not None:
                log.warning("worker %d ended with an error: %s", worker.rank, last_line(worker.exit_error("")))
            self._remove(worker, has_died=True)

    def _handle(self, worker: WorkerHandle, message: messages.FromWorker) -> None:
        match message:
            case messages.DeviceReport(device):
                self._compare_device(worker, device)
            case messages.ModelLoaded():
                worker.is_loaded = True
                worker.mark_busy()
            case messages.RowRequest():
                self._send_rows(worker, None if self._is_stopping else self._next_chunk(worker))
            case messages.WorkerIdle():
                worker.is_idle = True
                if not self._is_stopping:  # retry the rows that the worker received but did not commit
                    reason = f"{MAX_DEATHS} workers gave no result for this row, the last with no other row"
                    self._fail(self._ledger.record_death(worker.rank), reason)
            case messages.Heartbeat():
                worker.record_heartbeat()
            case messages.CommitReport(rows, report):
                if self._is_stopping:
                    worker.reset_silence()
                worker.report, self._failures[worker.rank] = report, 0
                # Another worker may already have committed some of the rows.
                new_keys = self._ledger.commit(row.key for row in rows)
                self._on_commit([row for row in rows if row.key in new_keys])
                self._task.on_report(self._make_report())
            case messages.LogMessage(name, _, text):
                # All workers load the same model, and say the same about it.
                if name.startswith("batch_infer.models"):
                    if text in self._model_messages:
                        return
                    self._model_messages.add(text)
                message.handle()
            case messages.WorkerError():
                worker.error = message
            case messages.WorkerDone(report):
                worker.report = report or worker.report
                self._ledger.release(worker.rank)
                self._remove(worker)

    def _hand_out_rows(self) -> None:
        """Send rows to idle workers. Once all rows are committed, let them end, and kill children that still load."""
        if self._is_stopping:
            return
        for worker in list(self._workers.values()):
            if worker.is_idle:
                chunk = self._next_rows(worker)
                if chunk is not None or self._ledger.is_done:
                    if self._rendering_since is None:
                        self._rendering_since = time.monotonic()
                        self._on_ready()
                    worker.mark_busy()
                    self._send_rows(worker, chunk)
            elif self._ledger.is_done and not worker.is_loaded and worker.is_restartable:  # no need to load the model
                worker.kill()
                self._remove(worker)

    def _next_rows(self, worker: WorkerHandle) -> Chunk | None:
        """Return new rows, or else rows to retry, or else None. A worker that keeps dying gets rows to retry first."""
        retry = self._ledger.next_retry
        if self._failures[worker.rank] < MAX_STARTS:
            return self._next_chunk(worker) or retry(worker.rank)
        return retry(worker.rank) or self._next_chunk(worker)

    def _next_chunk(self, worker: WorkerHandle) -> Chunk | None:
        return self._ledger.next_chunk(worker.rank, sum(not other.is_loaded for other in self._workers.values()))

    def _send_rows(self, worker: WorkerHandle, chunk: Chunk | None) -> None:
        carried = self._task.settings.carried
        worker.send(messages.RowChunk.from_chunk(chunk, carried) if chunk else messages.NoMoreRows())

    def _compare_device(self, worker: WorkerHandle, device: Device) -> None:
        """Stop with an error if a worker computes on another kind of device, since image bytes would depend on it.

        Warn if it computes on a device of the same kind with another name.
        """
        compute = self._task.settings.compute
        if device.kind != compute.device:
            message = f"worker {worker.rank} computes on {device.kind} and others on {compute.device}: set --device"
            self._error = self._error or SettingsError(message)
            self._stop()
        elif device.name != compute.device_name:
            message = "worker %d computes on %s and others on %s: an image's bytes may depend on which one renders it"
            log.warning(message, worker.rank, device.name, compute.device_name)

    def _kill_silent_workers(self) -> None:
        for worker in list(self._workers.values()):
            seconds = worker.overdue_seconds(self._source.timeouts, is_stopping=self._is_stopping)
            if seconds is None:
                continue
            worker.kill()
            if self._is_stopping:
                self._remove(worker, has_died=True)
            else:
                self._replace(worker, f"no heartbeat for {seconds:.0f} s")

    def _replace(self, worker: WorkerHandle, cause: str) -> None:
        """Retry the rows of a worker that has died or hangs, and restart it if possible, or stop with its error."""
        rank, error = worker.rank, worker.exit_error(cause)
        # Before anything is rendered, the cause is probably the model or the memory, and not the node.
        is_required = worker.is_required or (worker.is_restartable and self._rendering_since is None)
        must_start = is_required and not worker.is_loaded
        self._failures[rank] += 1
        may_retry_start = worker.error is None and self._failures[rank] < MAX_STARTS
        if (must_start and not may_retry_start) or isinstance(error, (RetryableError, SettingsError)):
            self._remove(worker)
            if self._rendering_since is not None and isinstance(error, ModelError):  # so that another run continues
                error = WorkersLostError(f"worker {rank} cannot start: {last_line(error)}")
            self._error = self._error or error
            self._stop()
            return
        self._remove(worker, has_died=True)
        message = "worker %d died (%s); its rows are retried; logs/worker-%d.log may have more details"
        log.warning(message, rank, last_line(error), rank)
        reason = f"{MAX_DEATHS} workers died over this row, the last with no other row: {last_line(error)}"
        self._fail(self._ledger.record_death(rank), reason)
        # After an exception that is no BatchInferError, another run would hit the same bug.
        is_bug = worker.error is not None and isinstance(error, WorkerCrashError)
        self._restart(rank, error, is_required=must_start, is_bug=is_bug)

    def _restart(self, rank: int, error: Exception, *, is_required: bool = False, is_bug: bool = False) -> None:
        """Restart a worker, or log that it is not restarted. Raise an error if it was the last one."""
        successor = self._source.restart(rank) if self._failures[rank] < MAX_FAILURES else None
        if successor is not None:
            successor.is_required = is_required
            self._add(successor)
            return
        pending = self._source.pending()
        if rank in pending:
            log.info("worker %d is requested again", rank)
            return
        log.warning("worker %d is not started again; %d remain", rank, len(self._workers) + len(pending))
        if self._workers or pending:
            return
        if is_bug:
            raise error
        raise WorkersLostError(f"no worker is left: the last one died ({last_line(error)})") from error

    def _fail(self, requests: Sequence[PromptRequest], reason: str) -> None:
        if requests:
            self._on_commit(commit_failed(self._task.settings, requests, reason, "parent"))
