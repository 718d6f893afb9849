"""Define tasks, their reports, and the protocols of engines and of worker sources."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from batch_infer.engines.handle import Timeouts, WorkerHandle
from batch_infer.errors import RetryableError
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.settings import Device
from batch_infer.worker import WorkerReport, WorkerSettings

OnCommit = Callable[[Sequence[ResultRow]], None]
OnReady = Callable[[], None]
Stop = Callable[[], bool]


class WorkersLostError(RetryableError):
    """No worker is left, the first one reports no device in time, or one cannot load the model that another has."""


@dataclass(frozen=True, slots=True)
class TaskReport:
    """The latest report of each worker that sent one, and the seconds from when the first was ready until all ended.

    A report that `Task.on_report` receives has the seconds until then. If the command's own process rendered, `seconds`
    ends when all rows are committed, and `processes` is 0. Otherwise `processes` is the engine's number of workers,
    even if fewer were needed. `deaths` counts workers that died. `lost_remote_worker` says whether one of these was not
    a child of this process, and may still write to OUT.
    """

    worker_reports: Sequence[WorkerReport]
    seconds: float
    processes: int = 0
    deaths: int = 0
    lost_remote_worker: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """Requests in rendering order, their approximate number, and the settings of the workers.

    `on_report` receives the state of the task after each call of `OnCommit` and each death of a worker.
    """

    requests: Iterable[PromptRequest]
    expected_count: int
    settings: WorkerSettings
    on_report: Callable[[TaskReport], None] = lambda report: None


class Engine(AbstractContextManager["Engine"], Protocol):
    """Renders a task with one or more workers. Each has its own GPU, or they share the CPU.

    A run enters the engine, calls `detect_device` once, calls `render` if rows are pending, and exits. It may call
    `render` again, for example after a CompilationError. `__enter__` may start workers, so that they import libraries
    while tables are read. Every worker calls `batch_infer.worker.Worker.render`, which stores and commits rows itself.
    The engine decides which worker gets which rows, reports committed rows, and, unless it raises an error, accounts
    for every row: a row that no worker can render is committed as failed. An engine whose workers are other processes
    can leave this to `supervisor.Supervisor` if it is also a `WorkerSource`, as `LocalEngine` is. `InlineEngine` is the
    shortest example.
    """

    @property
    def worker_count(self) -> int:
        """The number of workers, which is known once `detect_device` has returned."""
        ...

    def detect_device(self) -> Device:
        """Return the device of the workers.

        Raises SettingsError if the requested device is missing or there are too few GPUs, WorkersLostError if no device
        is found in time, and the error of a worker that cannot detect its device.
        """
        ...

    def render(self, task: Task, on_commit: OnCommit, stop: Stop, on_ready: OnReady = lambda: None) -> TaskReport:
        """Render and commit all requests. Once `stop` returns True, only commit the rows that are already finished.

        Calls `on_ready` at most once, when the first worker can start to render, and `on_commit` with rows that are in
        the manifest, perhaps without their prompts and carried cells. Raises ModelError only before anything is
        rendered, and SettingsError, StorageError, ServiceError and WorkersLostError at any time.
        """
        ...


class WorkerSource(Protocol):
    """Starts workers, requests them from a cluster, or accepts those that a launcher starts."""

    @property
    def worker_count(self) -> int: ...
    @property
    def timeouts(self) -> Timeouts: ...

    def start(self, expected_count: int) -> Iterable[WorkerHandle]:
        """Start and return the initial workers, no more than are needed for this many rows.

        The run ends if one of them cannot load the model.
        """
        ...

    def arrivals(self) -> Iterable[WorkerHandle]:
        """Return the workers that have connected since the last call."""
        ...

    def pending(self) -> Collection[int]:
        """Return the ranks of the workers that were requested and will be in `arrivals` later, if ever.

        A run does not end while some are pending and rows are left.
        """
        ...

    def failed_starts(self) -> Iterable[tuple[int, str]]:
        """Return the rank of each worker that ended while it was pending, and why, since the last call."""
        ...

    def restart(self, rank: int) -> WorkerHandle | None:
        """Restart a worker and return it. Return None if it is pending now, or if only its launcher can restart it."""
        ...
