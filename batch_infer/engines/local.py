"""The local engine: workers in processes of their own on this machine, one for each device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import active_children
from typing import TYPE_CHECKING

from batch_infer.engines.handle import Timeouts, WorkerHandle, start
from batch_infer.engines.messages import Broken, Found, Logged
from batch_infer.engines.protocol import Task, TaskReport
from batch_infer.engines.supervisor import POLL_SECONDS, Supervisor, error_of
from batch_infer.engines.worker_process import WorkerSpec
from batch_infer.errors import SettingsError, WorkersLost
from batch_infer.records import ResultRow
from batch_infer.settings import Device

if TYPE_CHECKING:
    from batch_infer.worker import ChainLoader


class LocalEngine:
    """Workers that this process starts, starts again where they die, and that do not outlive it."""

    def __init__(
        self, asked: str, processes: int | None, *, patience: Timeouts | None = None, load: ChainLoader | None = None
    ) -> None:
        """`asked`: the --device. `processes`: how many workers; by default one for each visible GPU, else one."""
        self.patience = patience or Timeouts()
        self.workers = self._own = processes or 1
        self._asked, self._processes, self._load = asked, processes, load
        self._started: dict[int, WorkerHandle] = {}
        self._early: WorkerHandle | None = None
        self._others = set(active_children())

    def __enter__(self) -> LocalEngine:
        self._early = self._start(0)  # it imports its libraries while the tables are looked at
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for peer in self._started.values():
            peer.end()
        for peer in self._started.values():
            peer.kill()
        for process in set(active_children()) - self._others:  # an interrupt came before we had noted it
            process.kill()

    def find_device(self) -> Device:
        """What the first worker has found. Raises WorkersLost where a hung driver keeps it from finding any."""
        device = _device_of(self._started[0], self.patience.device)
        most = device.count if device.kind == "cuda" else None
        self.workers = self._own = self._processes or most or 1
        if most is not None and self.workers > most:
            raise SettingsError(f"--num-processes {self.workers}: torch sees {most} GPUs here, and each worker has one")
        return device

    def render(
        self,
        task: Task,
        committed: Callable[[Sequence[ResultRow]], None],
        stop: Callable[[], bool],
        ready: Callable[[], None] = lambda: None,
    ) -> TaskReport:
        return Supervisor(task, self, committed, ready).go(stop)

    def gather(self, rows: int) -> Iterable[WorkerHandle]:
        early, self._early = self._early, None
        ranks = range(min(self._own, max(1, rows)))
        return [early if early and rank == 0 else self._start(rank) for rank in ranks]

    def newcomers(self) -> Iterable[WorkerHandle]:
        return ()

    def hire(self, rank: int) -> WorkerHandle | None:
        return self._start(rank)

    def _start(self, rank: int) -> WorkerHandle:
        self._started[rank] = start(WorkerSpec(rank, rank, self._asked, self._load))
        return self._started[rank]


def _device_of(peer: WorkerHandle, seconds: float) -> Device:
    """Return the device that a worker finds within so many seconds."""
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() <= deadline:
            peer.news.wait(POLL_SECONDS)
            peer.news.clear()
            for message in peer.receive():
                match message:
                    case Found(device):
                        return device
                    case Logged():
                        message.handle()
                    case Broken():
                        peer.broken = message
    except EOFError:
        raise error_of(peer, peer.fate()) from None
    raise WorkersLost(f"worker 0 has found no device in {seconds:.0f} s: does `nvidia-smi` answer?")
