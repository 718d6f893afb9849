"""Render with worker processes on this machine, by default one per GPU."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from multiprocessing import active_children
from typing import TYPE_CHECKING

from batch_infer.engines import messages
from batch_infer.engines.handle import Timeouts, WorkerHandle, start_worker
from batch_infer.engines.protocol import OnCommit, OnReady, Stop, Task, TaskReport, WorkersLostError
from batch_infer.engines.supervisor import POLL_SECONDS, Supervisor
from batch_infer.engines.worker_process import WorkerSpec
from batch_infer.errors import SettingsError
from batch_infer.settings import Device

if TYPE_CHECKING:
    from batch_infer.worker import ChainLoader


class LocalEngine:
    """Starts worker processes, restarts them if they die, and kills them on exit."""

    def __init__(
        self,
        requested_device: str,
        processes: int | None,
        *,
        timeouts: Timeouts | None = None,
        load: ChainLoader | None = None,
    ) -> None:
        """`processes` is the number of workers. If it is None, there is one per visible GPU, or one on a CPU."""
        self.timeouts = timeouts or Timeouts()
        self.worker_count = self._child_count = processes or 1
        self._requested_device, self._processes, self._load = requested_device, processes, load
        self._workers: dict[int, WorkerHandle] = {}
        """The latest worker of each rank that this engine has started."""
        self._first_worker: WorkerHandle | None = None
        self._other_children = set(active_children())

    def __enter__(self) -> LocalEngine:
        self._first_worker = self._start_child(0)  # the worker imports libraries while this process reads tables
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in set(active_children()) - self._other_children:  # an interrupt may have left one without a handle
            process.kill()
        for worker in self._workers.values():
            worker.kill()

    def detect_device(self) -> Device:
        device = wait_for_device(self._workers[0], self.timeouts.device)
        gpus = device.count if device.kind == "cuda" else None
        count = self.worker_count = self._child_count = self._processes or gpus or 1
        if gpus is not None and count > gpus:
            raise SettingsError(f"--num-processes {count}: torch sees {gpus} GPUs, and each worker needs one")
        return device

    def render(self, task: Task, on_commit: OnCommit, stop: Stop, on_ready: OnReady = lambda: None) -> TaskReport:
        return Supervisor(task, self, on_commit, on_ready).run(stop)

    def start(self, expected_count: int) -> Iterable[WorkerHandle]:
        ranks = range(min(self._child_count, max(1, expected_count)))
        first, self._first_worker = self._first_worker, None  # another call of `render` starts a new worker
        return [first if first and rank == 0 else self._start_child(rank) for rank in ranks]

    def arrivals(self) -> Iterable[WorkerHandle]:
        return ()

    def pending(self) -> Collection[int]:
        return ()

    def failed_starts(self) -> Iterable[tuple[int, str]]:
        return ()

    def restart(self, rank: int) -> WorkerHandle | None:
        return self._start_child(rank)

    def _start_child(self, rank: int) -> WorkerHandle:
        self._workers[rank] = start_worker(WorkerSpec(rank, rank, self._requested_device, self._load))
        return self._workers[rank]


def wait_for_device(worker: WorkerHandle, seconds: float) -> Device:
    """Return the device that a worker reports.

    Raises the worker's own error if it ends before, and WorkersLostError on timeout, for example if the driver hangs.
    """
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() <= deadline:
            worker.inbox_event.wait(POLL_SECONDS)
            worker.inbox_event.clear()
            for message in worker.receive():
                match message:
                    case messages.DeviceReport(device):
                        return device
                    case messages.LogMessage():
                        message.handle()
                    case messages.WorkerError():
                        worker.error = message
    except EOFError:
        raise worker.exit_error(worker.describe_exit()) from None
    raise WorkersLostError(f"worker {worker.rank} found no device in {seconds:.0f} s: does `nvidia-smi` respond?")
