"""A job, from its files to its outcome: mini-batches go out to workers, and rows, failures and deaths come back."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from batch_infer.simulation.deliveries import Deliveries
from batch_infer.simulation.files import cut, find_files
from batch_infer.simulation.kills import Kills
from batch_infer.simulation.messages import Began, Failed, FromWorker, MiniBatch, Ready, Returned
from batch_infer.simulation.outcome import Outcome
from batch_infer.simulation.pool import WorkerPool
from batch_infer.simulation.predictions import Predictions
from batch_infer.simulation.process import SIMULATED, TIMED_OUT, Assignment, WorkerProcess, end
from batch_infer.simulation.settings import SimulationSettings
from batch_infer.store import temporary_folder, write_errors

POLL_SECONDS = 0.2
SHUTDOWN_SECONDS = 30.0
"""How long workers may take to end once all is done."""
TRACE_LINES = 8

log = logging.getLogger("batch_infer")
Told = Callable[[Outcome], None]


def simulate(settings: SimulationSettings, told: Told = lambda outcome: None) -> Outcome:
    """Run a scoring script over files as a batch endpoint does, and report the outcome so far to `told`.

    Whether the job has failed is in the outcome. Raises SettingsError, TableError, StorageError.
    """
    settings.check()
    files = find_files(settings.inputs)
    with write_errors(settings.out):
        settings.out.mkdir(parents=True, exist_ok=True)
    predictions = Predictions(settings.out / "predictions.csv", kept=settings.append_rows)
    with temporary_folder() as folder:
        crew = WorkerPool(settings, Path(folder))
        try:
            with predictions:
                return Job(settings, files, crew, predictions, told).go()
        finally:
            for worker in list(crew.workers.values()):
                crew.bury(worker)


class Job:
    """What is under way, and what has come of it."""

    def __init__(
        self, settings: SimulationSettings, files: list[str], crew: WorkerPool, predictions: Predictions, told: Told
    ) -> None:
        draw = random.Random(settings.seed)
        draw.shuffle(files)
        mini_batches = cut(files, settings.mini_batch_size)
        self._settings, self._crew, self._predictions, self._told = settings, crew, predictions, told
        self._deliveries = Deliveries(mini_batches, settings.max_retries)
        self._deliveries.duplicate(settings.duplicate, draw)
        self._kills = Kills(settings.kill, len(mini_batches), draw)
        self._begun = Outcome(len(mini_batches), len(files), predictions=predictions.path, logs=crew.logs)
        self._deaths: Counter[str] = Counter()
        self._fault: str | None = None
        self._start = time.monotonic()
        self._first: float | None = None

    def go(self) -> Outcome:
        """Until every mini-batch is settled, or the job has failed."""
        self._told(self._outcome())
        while not self._deliveries.over and self._fault is None:
            if self._deliveries.head is not None:
                self._crew.fill()
            self._hand_out()
            wait([worker.link for worker in self._crew.workers.values()], self._pause())
            for worker in list(self._crew.workers.values()):
                self._hear(worker)
                self._end_the_due(worker)
        if self._fault is None and not self._deliveries.counts["succeeded"]:
            self._fault = "no succeeded mini batch: not one has returned a row"
        outcome = self._outcome()
        if self._fault is None:
            self._shut_down()
        return outcome

    def _outcome(self) -> Outcome:
        now = time.monotonic()
        return Outcome(
            mini_batches=self._begun.mini_batches,
            files=self._begun.files,
            predictions=self._begun.predictions,
            logs=self._begun.logs,
            **self._deliveries.counts,
            **self._deaths,
            kills_missed=self._kills.due,
            seconds=now - self._start,
            running_seconds=now - (self._first or now),
            fault=self._fault,
        )

    # What goes out

    def _hand_out(self) -> None:
        """Something for all who have nothing."""
        for worker in self._crew.workers.values():
            head = self._deliveries.head
            if head is None:
                return
            if worker.ready and worker.assignment is None and not self._waits(head):
                self._give(worker, self._deliveries.take())

    def _waits(self, mini_batch: MiniBatch) -> bool:
        """Whether this one is held back until it is known how long one takes."""
        assignments = [worker.assignment for worker in self._crew.workers.values()]
        learning = any(assignment and assignment.kill_after is None for assignment in assignments)
        return self._deliveries.is_first(mini_batch) and self._kills.waits(learning=learning)

    def _give(self, worker: WorkerProcess, mini_batch: MiniBatch) -> None:
        kill_after = None
        if not self._deliveries.is_done(mini_batch):
            kill_after = self._kills.arm(mini_batch, first=self._deliveries.is_first(mini_batch))
        self._deliveries.note_delivery(mini_batch)
        worker.assignment = Assignment(mini_batch, kill_after)
        worker.send(mini_batch)

    # What comes in

    def _pause(self) -> float:
        """For how long nothing has to be done unless a worker says something."""
        assignments = [worker.assignment for worker in self._crew.workers.values() if worker.assignment]
        dues = [due[0] for each in assignments if (due := each.due(self._settings.timeout))]
        return max(0.0, min([POLL_SECONDS, *(due - time.monotonic() for due in dues)]))

    def _end_the_due(self, worker: WorkerProcess) -> None:
        due = worker.assignment and worker.assignment.due(self._settings.timeout)
        if due and time.monotonic() >= due[0]:
            worker.kill(due[1])
            self._hear(worker)

    def _hear(self, worker: WorkerProcess) -> None:
        try:
            for message in worker.receive():
                self._take(worker, message)
        except EOFError:
            self._lose(worker)

    def _take(self, worker: WorkerProcess, message: FromWorker) -> None:
        assignment = worker.assignment
        match message:
            case Ready():
                worker.ready = True
            case Began() if assignment is not None:
                assignment.began = time.monotonic()
                self._first = self._first or assignment.began
            case Returned(rows) if assignment is not None:
                self._settle(worker, assignment)
                if assignment.began is not None and not self._deliveries.is_done(assignment.mini_batch):
                    self._kills.note(assignment.mini_batch, time.monotonic() - assignment.began)
                self._predictions.append(message)
                self._deliveries.returned(assignment.mini_batch, rows)
                self._check()
            case Failed(trace) if assignment is not None:
                self._settle(worker, assignment)
                if self._fail(worker, assignment.mini_batch, trace.strip().splitlines()[-1]):
                    self._give(worker, assignment.mini_batch)
            case Failed(trace):
                last = "\n".join(trace.strip().splitlines()[-TRACE_LINES:])
                self._fault = f"the script could not begin; the whole is in {worker.place.log}:\n{last}"

    def _settle(self, worker: WorkerProcess, assignment: Assignment) -> None:
        """A worker has done what it had, well or not; a kill that was to come is too late."""
        worker.assignment = None
        if assignment.kill_after is not None:
            self._kills.missed()

    def _lose(self, worker: WorkerProcess) -> None:
        """A worker has died. What it had is tried again by whoever comes."""
        assignment, worker.assignment = worker.assignment, None
        fate = worker.told_fate()
        self._crew.bury(worker)
        if not worker.ready:
            self._fault = self._fault or f"the script could not begin: {fate}; its log is {worker.place.log}"
        if assignment is None:
            return
        mini_batch = assignment.mini_batch
        if worker.fate == SIMULATED:
            self._kills.hit(mini_batch)
        elif assignment.kill_after is not None:
            self._kills.missed()
        self._deaths[{SIMULATED: "kills", TIMED_OUT: "timeouts"}.get(worker.fate, "deaths")] += 1
        if self._fail(worker, mini_batch, fate):
            self._deliveries.put_back(mini_batch)

    def _fail(self, worker: WorkerProcess, mini_batch: MiniBatch, reason: str) -> bool:
        """A run has failed. Whether it is to be tried again."""
        again = self._deliveries.failed(mini_batch)
        level = logging.INFO if worker.fate == SIMULATED else logging.WARNING
        told = (mini_batch.index, self._deliveries.told_try(mini_batch), worker.place.index, reason, worker.place.log)
        log.log(level, "mini-batch %d, %s, worker %d: %s (%s)", *told)
        self._check()
        return again and self._fault is None

    def _check(self) -> None:
        """See whether too many files have failed, and tell how it stands."""
        failed, allowed = self._deliveries.counts["failed_files"], self._settings.error_threshold
        if 0 <= allowed < failed:
            self._fault = self._fault or f"{failed} files have failed, and --error-threshold allows {allowed}"
        self._told(self._outcome())

    def _shut_down(self) -> None:
        for worker in end(self._crew.workers.values(), SHUTDOWN_SECONDS):
            log.warning("worker %d has not ended in order: %s", worker.place.index, worker.place.log)
