"""The protocols of engines: a task, the engine that renders it, its report, and the source of its workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
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
    """Every worker died, repeatedly, or none found a device."""


@dataclass(frozen=True, slots=True)
class Task:
    """Requests in rendering order, about how many there are, and the settings of the workers."""

    requests: Iterable[PromptRequest]
    expected_count: int
    settings: WorkerSettings


@dataclass(frozen=True, slots=True)
class TaskReport:
    """Reports of all workers, and the seconds from when the first was ready until the last ended.

    `processes` counts workers, 0 if the command's own process rendered. `deaths` counts workers that died.
    `lost_remote_worker`: one of these is not a child of this process, and may still write into OUT.
    """

    worker_reports: Sequence[WorkerReport]
    seconds: float
    processes: int = 0
    deaths: int = 0
    lost_remote_worker: bool = False


class Engine(Protocol):
    """Renders a task with one or more workers, each on its own device.

    A run enters the engine, calls `detect_device` and then `render` once, and exits. `__enter__` may start workers, so
    that they import libraries while tables are read. Every worker calls `batch_infer.worker.Worker.render`, which
    stores and commits rows itself. The engine decides which worker gets which rows, reports committed rows, and
    accounts for every row: one that no worker can render is committed as failed. An engine whose workers are other
    processes leaves all of that to `supervisor.Supervisor`, and only needs to be a `WorkerSource`, as `LocalEngine` is.
    `InlineEngine` is the shortest example. To add an engine, write it in a file of this package and add a line to
    `factory.make_engine`.
    """

    @property
    def worker_count(self) -> int:
        """Number of workers. Known once `detect_device` has returned."""
        ...

    def detect_device(self) -> Device:
        """Return the device of the workers.

        Raises SettingsError if the requested device is missing, WorkersLostError if no worker finds a device in time.
        """
        ...

    def render(self, task: Task, on_commit: OnCommit, stop: Stop, on_ready: OnReady = lambda: None) -> TaskReport:
        """Render and commit all requests, or until `stop` returns True and finished rows are committed.

        `on_ready` is called once, when the first worker has loaded its model. `on_commit` is called with rows that are
        in the manifest; their texts and carried cells may be missing. Raises ModelError and SettingsError before
        anything is rendered, StorageError, WorkersLostError.
        """
        ...

    def __enter__(self) -> Engine: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class WorkerSource(Protocol):
    """Starts workers, or accepts those that a launcher starts."""

    @property
    def worker_count(self) -> int: ...
    @property
    def timeouts(self) -> Timeouts: ...

    def start(self, rows: int) -> Iterable[WorkerHandle]:
        """Return the first workers, which must be able to load the model. `rows`: about how many rows there are."""
        ...

    def arrivals(self) -> Iterable[WorkerHandle]:
        """Return the workers that have connected since the last call."""
        ...

    def restart(self, rank: int) -> WorkerHandle | None:
        """Start a worker again, or return None if only its launcher can do that."""
        ...
