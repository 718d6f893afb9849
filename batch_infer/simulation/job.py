"""Run a simulated job: deliver mini-batches to workers, and count rows, failed tries and dead workers."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from multiprocessing.connection import wait
from pathlib import Path
from typing import TextIO

from batch_infer.simulation.process import KILLED, TIMED_OUT, Assignment, WorkerGroup, WorkerProcess
from batch_infer.simulation.schedule import DeliveryQueue, KillSchedule, MiniBatchState, find_files, split_files
from batch_infer.simulation.settings import SimulationOutcome, SimulationSettings
from batch_infer.simulation.worker import Event, MessageFromWorker, RunReturned, ScriptFailed
from batch_infer.store import temporary_folder, write_errors

POLL_SECONDS = 0.2
TRACEBACK_LINES = 8

log = logging.getLogger("batch_infer")
Report = Callable[[SimulationOutcome], None]


def simulate(settings: SimulationSettings, report: Report = lambda outcome: None) -> SimulationOutcome:
    """Run a scoring script on files as a batch endpoint does. Return the outcome, with a `fault` if the job failed.

    Calls `report` with the outcome so far at the start, after each try of a mini-batch, and at the end. Raises
    SettingsError, TableError, StorageError.
    """
    settings.check()
    files = find_files(settings.inputs)
    with write_errors(settings.out):
        settings.out.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as folder:
        workers = WorkerGroup(settings, Path(folder))
        with closing(workers), _open_predictions(settings) as predictions:
            return SimulatedJob(settings, files, workers, predictions, report).run()


def _open_predictions(settings: SimulationSettings) -> AbstractContextManager[TextIO | None]:
    """Open an empty predictions.csv if rows are appended, else remove that of an earlier job. Raises StorageError."""
    path = settings.predictions
    with write_errors(path):
        if settings.append_rows:  # characters that UTF-8 cannot encode are escaped
            return path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        path.unlink(missing_ok=True)
    return nullcontext()


class SimulatedJob:
    """Delivers the mini-batches of a job to workers until no delivery is left or the job fails."""

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
        path = settings.predictions if settings.append_rows else None
        self._outcome = SimulationOutcome(len(mini_batches), len(files), predictions=path, logs=workers.logs)
        self._queue = DeliveryQueue(mini_batches, settings.max_retries, self._outcome)
        self._queue.duplicate(settings.duplicate, rng)
        self._kills = KillSchedule(settings.kill, len(mini_batches), rng)
        self._start = time.monotonic()
        self._first_run: float | None = None

    def run(self) -> SimulationOutcome:
        """Run until no delivery is waiting or running, or the job fails. Return the outcome."""
        outcome = self._outcome
        self._report_outcome()
        while not self._queue.is_finished and outcome.fault is None:
            if self._queue.waiting:
                self._group.start_missing()
            self._deliver()
            wait([worker.connection for worker in self._workers()], self._seconds_to_next_event())
            for worker in self._workers():
                self._receive(worker)
                deadline = worker.assignment and worker.assignment.deadline(self._settings.timeout)
                if deadline and time.monotonic() >= deadline[0]:
                    worker.kill(deadline[1])
                    self._receive(worker)
        if outcome.fault is None and not outcome.succeeded:
            outcome.fault = "no succeeded mini batch: none has returned a row"
        self._report_outcome()
        if outcome.fault is None:
            for worker in self._group.shut_down():
                log.warning("worker %d did not shut down cleanly: see %s", worker.index, worker.log)
        return outcome

    def _workers(self) -> list[WorkerProcess]:
        return list(self._group.workers.values())

    def _report_outcome(self) -> None:
        """Fail the job if too many files have failed, and report the outcome so far."""
        failed, allowed = self._outcome.failed_files, self._settings.error_threshold
        if 0 <= allowed < failed and self._outcome.fault is None:
            self._outcome.fault = f"{failed} files have failed, but --error-threshold allows {allowed}"
        now = time.monotonic()
        self._outcome.seconds = now - self._start
        self._outcome.running_seconds = now - (self._first_run or now)
        self._outcome.kills_missed = self._kills.remaining
        self._report(self._outcome)

    def _deliver(self) -> None:
        """Give waiting mini-batches to idle workers, except those to hold back."""
        waiting = self._queue.waiting
        for worker in self._workers():
            if waiting and worker.is_ready and worker.assignment is None and not self._must_wait(waiting[0]):
                self._assign(worker, waiting.popleft())

    def _must_wait(self, state: MiniBatchState) -> bool:
        """Return whether a mini-batch is new and must wait until the duration of mini-batches is known."""
        assignments = [worker.assignment for worker in self._workers()]
        is_measuring = any(assignment and assignment.kill_after is None for assignment in assignments)
        return not state.deliveries and self._kills.must_wait(is_measuring=is_measuring)

    def _assign(self, worker: WorkerProcess, state: MiniBatchState) -> None:
        kill_after = None
        if state.rows is None:
            kill_after = self._kills.assign(state.mini_batch, is_new=not state.deliveries)
        state.deliveries += 1
        self._outcome.deliveries += 1
        worker.assignment = Assignment(state, kill_after)
        worker.send(state.mini_batch)

    def _seconds_to_next_event(self) -> float:
        assignments = [worker.assignment for worker in self._workers() if worker.assignment]
        deadlines = filter(None, (assignment.deadline(self._settings.timeout) for assignment in assignments))
        return max(0.0, min([POLL_SECONDS, *(deadline - time.monotonic() for deadline, _ in deadlines)]))

    def _receive(self, worker: WorkerProcess) -> None:
        try:
            for message in worker.receive():
                self._handle(worker, message)
        except EOFError:
            self._handle_death(worker)

    def _handle(self, worker: WorkerProcess, message: MessageFromWorker) -> None:
        assignment = worker.assignment
        match message:
            case Event.READY:
                worker.is_ready = True
            case Event.RUN_STARTED if assignment is not None:
                assignment.start = time.monotonic()
                self._first_run = self._first_run or assignment.start
            case RunReturned() | ScriptFailed() if assignment is not None:
                worker.assignment = None
                if assignment.kill_after is not None:  # the run ended before its kill
                    self._kills.remaining += 1
                if isinstance(message, RunReturned):
                    self._handle_rows(assignment, message)
                elif self._handle_failure(worker, assignment.state, message.traceback.strip().splitlines()[-1]):
                    self._assign(worker, assignment.state)
            case ScriptFailed(text):
                last_lines = "\n".join(text.strip().splitlines()[-TRACEBACK_LINES:])
                self._outcome.fault = f"the script did not start; the full traceback is in {worker.log}:\n{last_lines}"

    def _handle_rows(self, assignment: Assignment, message: RunReturned) -> None:
        state = assignment.state
        if assignment.start is not None and state.rows is None:
            self._kills.record_duration(state.mini_batch, time.monotonic() - assignment.start)
        if self._predictions is not None:
            with write_errors(self._settings.predictions):
                if message.header and not self._predictions.tell():
                    self._predictions.write(message.header)
                self._predictions.write(message.text)
                self._predictions.flush()
        self._queue.record_success(state, message.rows)
        self._report_outcome()

    def _handle_death(self, worker: WorkerProcess) -> None:
        """Remove a worker that has died. If its mini-batch may be retried, any worker can get it."""
        assignment, worker.assignment = worker.assignment, None
        exit_text = worker.describe_exit()
        self._group.remove(worker)
        if not worker.is_ready and self._outcome.fault is None:
            self._outcome.fault = f"the script did not start: {exit_text}; its log is {worker.log}"
        if assignment is None:
            return
        if worker.kill_reason == KILLED:
            self._outcome.kills += 1
            self._kills.killed.add(assignment.state.mini_batch.index)
        else:
            self._outcome.timeouts += worker.kill_reason == TIMED_OUT
            self._outcome.deaths += worker.kill_reason != TIMED_OUT
            if assignment.kill_after is not None:
                self._kills.remaining += 1
        if self._handle_failure(worker, assignment.state, exit_text):
            self._queue.waiting.append(assignment.state)

    def _handle_failure(self, worker: WorkerProcess, state: MiniBatchState, reason: str) -> bool:
        """Count and log a failed try of a mini-batch, and return whether to retry it."""
        must_retry, description = self._queue.record_failure(state)
        level = logging.INFO if worker.kill_reason == KILLED else logging.WARNING
        details = (state.mini_batch.index, description, worker.index, reason, worker.log)
        log.log(level, "mini-batch %d, %s, worker %d: %s (%s)", *details)
        self._report_outcome()
        return must_retry and self._outcome.fault is None
