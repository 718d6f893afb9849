"""Render in the actors of a Ray cluster, one per GPU, or per `threads` CPUs.

Actors connect to the supervisor as the ranks of a launcher do. Ray only places, starts and kills them: rows, results
and errors do not pass through it. It restarts no actor, since the supervisor decides about replacements.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from batch_infer.engines.actor_pool import ActorPool, Resources
from batch_infer.engines.handle import Timeouts, WorkerHandle
from batch_infer.engines.local import wait_for_device
from batch_infer.engines.protocol import OnCommit, OnReady, Stop, Task, TaskReport, WorkersLostError
from batch_infer.engines.supervisor import MAX_FAILURES, POLL_SECONDS, Supervisor
from batch_infer.errors import BatchInferError
from batch_infer.records import ResultRow
from batch_infer.settings import Device, ModelSettings

if TYPE_CHECKING:
    from batch_infer.engines.ray import RayCluster
    from batch_infer.worker import ChainLoader

ARRIVAL_SECONDS = 1800.0
"""Maximum number of seconds to wait for a worker if there is none, since an autoscaler may have to start a node."""
NOTICE_SECONDS = 10.0
"""Number of seconds without a worker after which the log says what the run waits for."""
CHECK_SECONDS = 1.0
"""Minimum number of seconds between checks whether actors have ended."""
GROW_SECONDS = 5.0
"""Minimum number of seconds between checks whether nodes have joined the cluster."""
GRACE_SECONDS, STOP_GRACE_SECONDS = 10.0, 1.0
"""Maximum number of seconds in which workers whose rows are committed may upload their logs, also after a stop."""
KILL_SECONDS = 10.0
"""Maximum number of seconds to wait until all actors are killed, since they might still write to OUT."""

log = logging.getLogger("batch_infer")


class RayEngine:
    """Requests actors, replaces those that die, and kills all at the end."""

    def __init__(
        self,
        cluster: RayCluster,
        model: ModelSettings,
        processes: int | None,
        threads: int,
        *,
        timeouts: Timeouts | None = None,
        load: ChainLoader | None = None,
    ) -> None:
        """`processes` is the number of workers. If it is None, there are as many as the cluster has room for."""
        self.timeouts = timeouts or Timeouts()
        self.worker_count = processes or 1
        self._cluster, self._model, self._load = cluster, model, load
        self._processes, self._threads = processes, threads
        self._first_worker: WorkerHandle | None = None
        self._max_workers = 0
        """Maximum number of workers to which the engine may grow."""
        self._checked_at = self._grown_at = 0.0
        self._waiting_since: float | None = None
        self._has_noticed = False

    def __enter__(self) -> RayEngine:
        with ExitStack() as stack:
            stack.enter_context(self._cluster)
            device = self._model.device
            uses_gpu = device == "cuda" or (device == "auto" and self._cluster.has_gpus())
            needs = Resources(self._threads, int(uses_gpu))
            self._pool = stack.enter_context(ActorPool(self._cluster, self._model, needs, self._load))
            self._pool.request(0)  # the worker imports libraries while this process reads tables
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def detect_device(self) -> Device:
        """Implement `Engine.detect_device`. Replace the first worker if it dies, for example with its node."""
        failures = 0
        while True:
            worker = self._wait_for_worker()
            try:
                device = wait_for_device(worker, self.timeouts.device)
            except BatchInferError as error:
                failures += 1
                if worker.error is not None or failures == MAX_FAILURES:
                    raise
                log.warning("worker 0 is requested again: %s", error)
                worker.kill()  # it may hang, and would keep its GPU
                self._pool.request(0)
            else:
                break
        self._first_worker = worker
        self.worker_count = self._processes or max(1, self._cluster.count_actors(self._pool.needs))
        return replace(device, count=self.worker_count)

    def _wait_for_worker(self) -> WorkerHandle:
        """Wait until a worker connects. Raises WorkersLostError if no attempt succeeds or it takes too long."""
        failures = 0
        while True:
            for worker in self.arrivals():
                return worker
            for rank, cause in self.failed_starts():
                failures += 1
                log.warning("worker %d ended before it connected (%s)", rank, cause)
                if failures == MAX_FAILURES:
                    raise WorkersLostError(f"no worker can start on the Ray cluster: {cause}")
                self._pool.request(rank)
            time.sleep(POLL_SECONDS)

    def render(self, task: Task, on_commit: OnCommit, stop: Stop, on_ready: OnReady = lambda: None) -> TaskReport:
        def count_and_report(rows: Sequence[ResultRow]) -> None:
            self._cluster.metrics.add(rows)
            on_commit(rows)

        # The initial workers share the safety service's rate limit, so no more may be added.
        may_grow = self._processes is None and task.settings.safety.service is None
        self._max_workers = max(1, task.expected_count) if may_grow else 0
        grace_seconds = 0.0
        try:
            report = Supervisor(task, self, count_and_report, on_ready).run(stop)
            grace_seconds = STOP_GRACE_SECONDS if stop() else GRACE_SECONDS
            return report
        finally:
            self._pool.kill_all(KILL_SECONDS, grace_seconds)

    def start(self, expected_count: int) -> Iterable[WorkerHandle]:
        first, self._first_worker = self._first_worker, None  # another call of `render` requests new workers
        for rank in range(int(first is not None), min(self.worker_count, max(1, expected_count))):
            self._pool.request(rank)
        return [] if first is None else [first]

    def arrivals(self) -> Iterable[WorkerHandle]:
        now = time.monotonic()
        if now - self._checked_at >= CHECK_SECONDS:
            self._checked_at = now
            self._pool.forget_ended()
            self._check_wait(now)
            self._grow(now)
            self._cluster.metrics.set_workers(self._pool.count_connected(), len(self._pool.pending()))
        return self._pool.arrivals()

    def pending(self) -> Collection[int]:
        return self._pool.pending()

    def failed_starts(self) -> Iterable[tuple[int, str]]:
        return self._pool.failed_starts()

    def restart(self, rank: int) -> WorkerHandle | None:
        """Request another actor. There is no handle before its worker connects."""
        self._pool.request(rank)
        return None

    def _check_wait(self, now: float) -> None:
        """Log what the run waits for if there is no worker. Raises WorkersLostError after ARRIVAL_SECONDS."""
        if self._pool.count_connected() or not self._pool.pending():
            self._waiting_since, self._has_noticed = None, False
            return
        self._waiting_since = self._waiting_since or now
        seconds = now - self._waiting_since
        if seconds >= ARRIVAL_SECONDS:
            raise WorkersLostError(f"the Ray cluster placed no worker that needs {self._pool.needs} in {seconds:.0f} s")
        if seconds >= NOTICE_SECONDS and not self._has_noticed:
            self._has_noticed = True
            log.info("waiting for the Ray cluster to place a worker that needs %s", self._pool.needs)
            if not self._cluster.count_actors(self._pool.needs):
                log.warning("no node of the Ray cluster has that many: reduce --threads, or wait for a larger node")

    def _grow(self, now: float) -> None:
        """Request workers for nodes that have joined the cluster."""
        if now - self._grown_at < GROW_SECONDS or self.worker_count >= self._max_workers:
            return
        self._grown_at = now
        places = min(self._cluster.count_actors(self._pool.needs), self._max_workers)
        if places > self.worker_count:
            log.info("the Ray cluster has room for %d more workers", places - self.worker_count)
        for rank in range(self.worker_count, places):
            self._pool.request(rank)
        self.worker_count = max(self.worker_count, places)
