"""What every engine does: the protocol, a task, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from batch_infer.records import PromptRequest, ResultRow
from batch_infer.settings import Device
from batch_infer.worker import WorkerReport, WorkerSettings


@dataclass(frozen=True, slots=True)
class Task:
    """Requests in the order in which they are to be rendered, about how many there are, and how to render them."""

    requests: Iterable[PromptRequest]
    expected: int
    settings: WorkerSettings


@dataclass(frozen=True, slots=True)
class TaskReport:
    """What a task took: the accounts of its workers, and the seconds from when they were ready to the last's end.

    `processes` rendered it, 0 where that was the command's own; `deaths` of them were made good. `has_strays`: one that
    was lost is not a child of this process, and may still be writing in OUT.
    """

    worker_reports: Sequence[WorkerReport]
    seconds: float
    processes: int = 0
    deaths: int = 0
    lost_remote_worker: bool = False


class Engine(Protocol):
    """Holds workers, from before their device is known until it is left."""

    @property
    def workers(self) -> int:
        """How many there are, each with a device of its own; known with the device."""
        ...

    def find_device(self) -> Device:
        """Raises SettingsError where the requested device is missing, WorkersLost where none is found in time."""
        ...

    def render(
        self,
        task: Task,
        committed: Callable[[Sequence[ResultRow]], None],
        stop: Callable[[], bool],
        ready: Callable[[], None] = lambda: None,
    ) -> TaskReport:
        """Have all requests rendered and committed, or as many as are until `stop` says so.

        `ready` is called once, when the first worker has loaded its model and gets rows.
        `committed` is told of rows once they are in the manifest; of these, status, size and length are true, and texts
        may be left out. Raises ModelError and SettingsError before anything is rendered, StorageError, WorkersLost.
        """
        ...

    def __enter__(self) -> Engine: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
