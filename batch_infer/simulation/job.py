"""A simulated job: mini-batches are delivered to workers; their rows, failures and deaths are counted."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import TextIO

from batch_infer.simulation.mini_batches import MiniBatch, find_files, split_files
from batch_infer.simulation.process import KILLED, TIMED_OUT, Assignment, WorkerGroup, WorkerProcess
from batch_infer.simulation.schedule import DeliveryQueue, KillSchedule
from batch_infer.simulation.settings import SimulationOutcome, SimulationSettings
from batch_infer.simulation.worker import MessageFromWorker, RunReturned, RunStarted, ScriptFailed, ScriptReady
from batch_infer.store import temporary_folder, write_errors

POLL_SECONDS = 0.2
SHUTDOWN_SECONDS = 30.0
"""How long workers may take to shut down at the end."""
TRACEBACK_LINES = 8

log = logging.getLogger("batch_infer")
Report = Callable[[SimulationOutcome], None]


def simulate(settings: SimulationSettings, report: Report = lambda outcome: None) -> SimulationOutcome:
    """Run a scoring script over files as a batch endpoint does, and call `report` with the outcome so far.

    The outcome says whether the job has failed. Raises SettingsError, TableError, StorageError.
    """
    settings.check()
    files = find_files(settings.inputs)
    with write_errors(settings.out):
        settings.out.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as folder:
        workers = WorkerGroup(settings, Path(folder))
        with closing(workers), _open_predictions(settings) as predictions:
            return SimulatedJob(settings, files, workers, predictions, report).run()


def _predictions_path(settings: SimulationSettings) -> Path:
    return settings.out / "predictions.csv"


@contextmanager
def _open_predictions(settings: SimulationSettings) -> Iterator[TextIO | None]:
    """Open an empty predictions.csv, or remove the one of an earlier job and yield None. Raises StorageError."""
    path = _predictions_path(settings)
    if not settings.append_rows:
        with write_errors(path):
            path.unlink(missing_ok=True)
        yield None
        return
    with write_errors(path):  # characters that UTF-8 cannot encode are escaped
        file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
    with file:
        yield file


class SimulatedJob:
    """The state of a job: deliveries, workers and the outcome so far."""

    def __init__(
        self,
        settings: SimulationSettings,
        files: list[str],
        workers: WorkerGroup,
        predictions: TextIO | None,
        report: Report,
    ) -> None:
        rng = random.Random(settings.seed)
        rng.shuffle(files)
        mini_batches = split_files(files, settings.mini_batch_size)
        self._settings, self._group, self._predictions, self._report = settings, workers, predictions, report
        path = _predictions_path(settings) if settings.append_rows else None
        self._outcome = SimulationOutcome(len(mini_batches), len(files), predictions=path, logs=workers.logs)
        self._queue = DeliveryQueue(mini_batches, settings.max_retries, self._outcome)
        self._queue.duplicate(settings.duplicate, rng)
        self._kills = KillSchedule(settings.kill, len(mini_batches), rng)
        self._start = time.monotonic()
        self._first_run: float | None = None

    def run(self) -> SimulationOutcome:
        """Run until all mini-batches have succeeded or failed, or the job has failed."""
        outcome = self._outcome
        self._report_outcome()
        while not self._queue.is_finished and outcome.fault is None:
            if self._queue.head is not None:
                self._group.start_missing()
            self._deliver()
            wait([worker.connection for worker in self._workers()], self._seconds_to_next_event())
            for worker in self._workers():
                self._receive(worker)
                self._kill_overdue(worker)
        if outcome.fault is None and not outcome.succeeded:
            outcome.fault = "no succeeded mini batch: none has returned a row"
        self._update_times()
        if outcome.fault is None:
            for worker in self._group.shut_down(SHUTDOWN_SECONDS):
                log.warning("worker %d did not shut down cleanly: see %s", worker.index, worker.log)
        return outcome

    def _workers(self) -> list[WorkerProcess]:
        return list(self._group.workers.values())

    def _report_outcome(self) -> None:
        self._update_times()
        self._report(self._outcome)

    def _update_times(self) -> None:
        now = time.monotonic()
        self._outcome.seconds = now - self._start
        self._outcome.running_seconds = now - (self._first_run or now)
        self._outcome.kills_missed = self._kills.remaining

    # Deliveries

    def _deliver(self) -> None:
        """Give each idle worker a mini-batch."""
        for worker in self._workers():
            head = self._queue.head
            if head is None:
                return
            if worker.is_ready and worker.assignment is None and not self._must_wait(head):
                self._assign(worker, self._queue.take())

    def _must_wait(self, mini_batch: MiniBatch) -> bool:
        """Return whether to hold a mini-batch back until it is known how long one takes."""
        assignments = [worker.assignment for worker in self._workers()]
        is_measuring = any(assignment and assignment.kill_after is None for assignment in assignments)
        return self._queue.is_new(mini_batch) and self._kills.must_wait(is_measuring=is_measuring)

    def _assign(self, worker: WorkerProcess, mini_batch: MiniBatch) -> None:
        kill_after = None
        if not self._queue.has_succeeded(mini_batch):
            kill_after = self._kills.assign(mini_batch, is_new=self._queue.is_new(mini_batch))
        self._queue.record_delivery(mini_batch)
        worker.assignment = Assignment(mini_batch, kill_after)
        worker.send(mini_batch)

    # Messages, deadlines and deaths

    def _seconds_to_next_event(self) -> float:
        assignments = [worker.assignment for worker in self._workers() if worker.assignment]
        deadlines = [each[0] for assignment in assignments if (each := assignment.deadline(self._settings.timeout))]
        return max(0.0, min([POLL_SECONDS, *(deadline - time.monotonic() for deadline in deadlines)]))

    def _kill_overdue(self, worker: WorkerProcess) -> None:
        deadline = worker.assignment and worker.assignment.deadline(self._settings.timeout)
        if deadline and time.monotonic() >= deadline[0]:
            worker.kill(deadline[1])
            self._receive(worker)

    def _receive(self, worker: WorkerProcess) -> None:
        try:
            for message in worker.receive():
                self._handle(worker, message)
        except EOFError:
            self._handle_death(worker)

    def _handle(self, worker: WorkerProcess, message: MessageFromWorker) -> None:
        assignment = worker.assignment
        match message:
            case ScriptReady():
                worker.is_ready = True
            case RunStarted() if assignment is not None:
                assignment.start = time.monotonic()
                self._first_run = self._first_run or assignment.start
            case RunReturned() if assignment is not None:
                self._finish(worker, assignment)
                self._handle_rows(assignment, message)
            case ScriptFailed(text) if assignment is not None:
                self._finish(worker, assignment)
                if self._handle_failure(worker, assignment.mini_batch, text.strip().splitlines()[-1]):
                    self._assign(worker, assignment.mini_batch)
            case ScriptFailed(text):
                last = "\n".join(text.strip().splitlines()[-TRACEBACK_LINES:])
                self._outcome.fault = f"the script did not start; the full traceback is in {worker.log}:\n{last}"

    def _finish(self, worker: WorkerProcess, assignment: Assignment) -> None:
        """Make a worker idle. A kill that was due later has missed."""
        worker.assignment = None
        if assignment.kill_after is not None:
            self._kills.record_miss()

    def _handle_rows(self, assignment: Assignment, message: RunReturned) -> None:
        mini_batch = assignment.mini_batch
        if assignment.start is not None and not self._queue.has_succeeded(mini_batch):
            self._kills.record_duration(mini_batch, time.monotonic() - assignment.start)
        if self._predictions is not None:
            with write_errors(_predictions_path(self._settings)):
                if message.header and not self._predictions.tell():
                    self._predictions.write(message.header)
                self._predictions.write(message.text)
                self._predictions.flush()
        self._queue.record_success(mini_batch, message.rows)
        self._check_threshold()

    def _handle_death(self, worker: WorkerProcess) -> None:
        """Remove a worker that has died. Its mini-batch is retried by any worker."""
        assignment, worker.assignment = worker.assignment, None
        exit_text = worker.describe_exit()
        self._group.remove(worker)
        if not worker.is_ready and self._outcome.fault is None:
            self._outcome.fault = f"the script did not start: {exit_text}; its log is {worker.log}"
        if assignment is None:
            return
        if worker.kill_reason == KILLED:
            self._outcome.kills += 1
            self._kills.record_hit(assignment.mini_batch)
        else:
            self._outcome.timeouts += worker.kill_reason == TIMED_OUT
            self._outcome.deaths += worker.kill_reason != TIMED_OUT
            if assignment.kill_after is not None:
                self._kills.record_miss()
        if self._handle_failure(worker, assignment.mini_batch, exit_text):
            self._queue.put_back(assignment.mini_batch)

    def _handle_failure(self, worker: WorkerProcess, mini_batch: MiniBatch, reason: str) -> bool:
        """Count and log a failed run, and return whether to retry it."""
        must_retry = self._queue.record_failure(mini_batch)
        level = logging.INFO if worker.kill_reason == KILLED else logging.WARNING
        details = (mini_batch.index, self._queue.describe_try(mini_batch), worker.index, reason, worker.log)
        log.log(level, "mini-batch %d, %s, worker %d: %s (%s)", *details)
        self._check_threshold()
        return must_retry and self._outcome.fault is None

    def _check_threshold(self) -> None:
        """Fail the job if too many files have failed, and report the outcome so far."""
        failed, allowed = self._outcome.failed_files, self._settings.error_threshold
        if 0 <= allowed < failed and self._outcome.fault is None:
            self._outcome.fault = f"{failed} files have failed, and --error-threshold allows {allowed}"
        self._report_outcome()
