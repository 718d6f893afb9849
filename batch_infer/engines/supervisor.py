"""A shift: workers render a task, rows go out and committed ones come in, and a worker that dies is replaced."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from threading import Event
from typing import Protocol

from batch_infer import errors, main_guard
from batch_infer.engines.handle import Timeouts, WorkerHandle
from batch_infer.engines.ledger import STRIKES, Chunk, Ledger
from batch_infer.engines.messages import (
    Alive,
    Begin,
    Broken,
    Committed,
    Ended,
    Found,
    FromWorker,
    Idle,
    Logged,
    NoMore,
    Ready,
    Rows,
    Stop,
    Wants,
)
from batch_infer.engines.protocol import Task, TaskReport
from batch_infer.errors import BatchInferError, ModelError, SettingsError, TryAgainLater, WorkersLost
from batch_infer.manifest import Manifest
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.settings import Device
from batch_infer.sinks import make_sink
from batch_infer.stopping import deferred
from batch_infer.worker import WorkerReport, make_row

POLL_SECONDS = 0.2
STARTS = 2
"""How often a worker may be killed while it loads the model before that ends the run."""
SUSPENDED_SECONDS = 5.0
BARREN_LIVES = 10
"""A worker that died so often in a row without having committed a row is not started again."""

log = logging.getLogger("batch_infer")


class WorkerCrash(RuntimeError):
    """A worker has met a bug; the message is its traceback."""


class WorkerSource(Protocol):
    """Who brings the workers."""

    @property
    def workers(self) -> int: ...
    @property
    def patience(self) -> Timeouts: ...

    def gather(self, rows: int) -> Iterable[WorkerHandle]:
        """Those without whom nothing begins, for about so many rows."""
        ...

    def newcomers(self) -> Iterable[WorkerHandle]:
        """Those who have come since."""
        ...

    def hire(self, rank: int) -> WorkerHandle | None:
        """One in the place of this one, or None where that is somebody else's to do."""
        ...


class Supervisor:
    """One task, from its first row to the last."""

    def __init__(
        self,
        task: Task,
        crew: WorkerSource,
        committed: Callable[[Sequence[ResultRow]], None],
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._task, self._crew, self._committed, self._ready = task, crew, committed, ready
        self._ledger = Ledger(task.requests, task.expected, crew.workers)
        self._peers: dict[int, WorkerHandle] = {}
        self._news = Event()
        self._awaited: set[int] = set()
        self._accounts: list[WorkerReport] = []
        self._barren: Counter[int] = Counter()
        self._deaths, self._has_strays = 0, False
        self._stopping = False
        self._error: Exception | None = None
        self._began: float | None = None

    def go(self, stop: Callable[[], bool]) -> TaskReport:
        """Until every row is settled, or `stop` says so and what is finished is committed. Raises as an engine does."""
        for peer in self._crew.gather(self._task.expected):
            self._awaited.add(peer.rank)
            self._welcome(peer)
        self._ledger.prime()
        turned = time.monotonic()
        with deferred():
            while self._peers:
                if stop():
                    self._stop()
                turned = self._note_turn(turned)
                for peer in self._crew.newcomers():
                    self._welcome(peer)
                self._news.wait(POLL_SECONDS)
                self._news.clear()
                for peer in list(self._peers.values()):
                    self._hear(peer)
                self._end_the_hung()
                self._hand_out()
        if self._error is not None:
            raise self._error
        now = time.monotonic()
        return TaskReport(
            self._accounts, now - (self._began or now), self._crew.workers, self._deaths, self._has_strays
        )

    def _note_turn(self, before: float) -> float:
        """Hold against no worker the time in which this process was suspended and heard nobody."""
        now = time.monotonic()
        if now - before > SUSPENDED_SECONDS:
            for peer in self._peers.values():
                peer.forgive()
        return now

    def _welcome(self, peer: WorkerHandle) -> None:
        if self._stopping:  # it came too late
            peer.send(Stop())
            return
        peer.forgive()  # it has waited for its task, for as long as the tables were scanned
        self._peers[peer.rank] = peer
        peer.notify(self._news)
        peer.send(Begin(self._task.settings))

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            for peer in list(self._peers.values()):
                peer.send(Stop())
                peer.forgive()
                if not peer.ready:  # it may load for minutes, and has nothing to put in order
                    peer.kill()
                    self._dismiss(peer)

    def _hear(self, peer: WorkerHandle) -> None:
        try:
            for message in peer.receive():
                self._take(peer, message)
        except EOFError:
            if self._peers.get(peer.rank) is not peer:  # it has said that it ends, and did
                return
            if not self._stopping:
                self._lose(peer, peer.fate())
                return
            if peer.broken is not None:
                log.warning("worker %d ended with an error: %s", peer.rank, _sentence(error_of(peer, "")))
            self._count_death(peer)
            self._dismiss(peer)

    def _take(self, peer: WorkerHandle, message: FromWorker) -> None:
        match message:
            case Found(device):
                self._compare(peer, device)
            case Ready():
                peer.ready = True
                peer.begin()
                self._awaited.discard(peer.rank)
            case Wants():
                self._give(peer, None if self._stopping else self._ledger.stream(peer.rank, self._loading()))
            case Idle():
                peer.rest()
                if not self._stopping:  # it has none left; but one that it lost must not be waited for
                    why = f"{STRIKES} workers gave no result for this row; worker {peer.rank} had no other row left"
                    self._fail(self._ledger.give_up(peer.rank), why)
            case Alive():
                peer.note_sign()
            case Committed(rows, account):
                if self._stopping:
                    peer.forgive()
                peer.account, self._barren[peer.rank] = account, 0
                self._tell(rows)
            case Logged():
                message.handle()
            case Broken():
                peer.broken = message
            case Ended(account):
                peer.account = account or peer.account
                self._ledger.take_back(peer.rank)
                self._dismiss(peer)

    def _tell(self, rows: Sequence[ResultRow]) -> None:
        """Rows are committed; one that two workers have done counts once."""
        new = self._ledger.settle(row.key for row in rows)
        self._committed([row for row in rows if row.key in new])

    def _hand_out(self) -> None:
        """Give something to each worker that has nothing."""
        if self._stopping:
            return
        for peer in list(self._peers.values()):
            if peer.waiting:
                chunk = self._next_for(peer)
                if chunk is not None or self._ledger.over:
                    self._note_begin()
                    peer.begin()
                    self._give(peer, chunk)
            elif self._ledger.over and not peer.ready and peer.ours:  # nobody waits for it to load
                peer.kill()
                self._dismiss(peer)

    def _note_begin(self) -> None:
        if self._began is None:
            self._began = time.monotonic()
            self._ready()

    def _give(self, peer: WorkerHandle, chunk: Chunk | None) -> None:
        peer.send(NoMore() if chunk is None else Rows.of(chunk, self._task.settings.carried))

    def _loading(self) -> int:
        return sum(not peer.ready for peer in self._peers.values())

    def _next_for(self, peer: WorkerHandle) -> Chunk | None:
        """New rows before those that workers died with, unless that is all that this one does."""
        ledger, rank = self._ledger, peer.rank
        if self._barren[rank] < STARTS:
            return ledger.stream(rank, self._loading()) or ledger.apart(rank)
        return ledger.apart(rank) or ledger.stream(rank, self._loading())

    def _compare(self, peer: WorkerHandle, device: Device) -> None:
        """All workers compute alike, or bytes would depend on who has a row."""
        compute = self._task.settings.compute
        if device.kind != compute.device:
            told = f"worker {peer.rank} computes on {device.kind} and others on {compute.device}: say --device"
            self._error = self._error or SettingsError(told)
            self._stop()
        elif device.name != compute.device_name:
            told = "worker %d computes on %s and others on %s: bytes may depend on who has a row"
            log.warning(told, peer.rank, device.name, compute.device_name)

    def _end_the_hung(self) -> None:
        for peer in list(self._peers.values()):
            if (silent := peer.silence(self._crew.patience, is_stopping=self._stopping)) is not None:
                peer.kill()
                if self._stopping:
                    self._count_death(peer)
                    self._dismiss(peer)
                else:
                    self._lose(peer, f"nothing was heard of it for {silent:.0f} s")

    def _dismiss(self, peer: WorkerHandle) -> None:
        if self._peers.get(peer.rank) is peer:
            del self._peers[peer.rank]
            self._awaited.discard(peer.rank)
            if peer.account is not None:
                self._accounts.append(peer.account)

    def _count_death(self, peer: WorkerHandle) -> None:
        """Count a worker that may have left something in OUT."""
        self._deaths += 1
        self._has_strays |= not peer.ours

    def _lose(self, peer: WorkerHandle, fate: str) -> None:
        """A worker has died: see to its rows, and to another in its place."""
        error = error_of(peer, fate)
        starting = peer.rank in self._awaited
        self._dismiss(peer)
        self._barren[peer.rank] += 1
        chance = peer.broken is None and self._barren[peer.rank] < STARTS
        if (starting and not chance) or isinstance(error, (TryAgainLater, SettingsError)):
            if self._began is not None and isinstance(error, ModelError):  # others render: what they commit is merged
                error = WorkersLost(f"worker {peer.rank} cannot start: {_sentence(error)}")
            self._error = self._error or error
            self._stop()
            return
        self._count_death(peer)
        told = "worker %d has died (%s); its rows are tried again, and logs/worker-%d.log may say more"
        log.warning(told, peer.rank, _sentence(error), peer.rank)
        why = f"{STRIKES} workers have died over this row, the last with nothing else to do: {_sentence(error)}"
        self._fail(self._ledger.give_up(peer.rank), why)
        self._replace(peer, error)
        if starting:
            self._awaited.add(peer.rank)

    def _replace(self, peer: WorkerHandle, error: Exception) -> None:
        another = self._crew.hire(peer.rank) if self._barren[peer.rank] < BARREN_LIVES else None
        if another is not None:
            self._welcome(another)
            return
        log.warning("worker %d is not started again: %d are left", peer.rank, len(self._peers))
        if not self._peers:
            if peer.broken is not None and isinstance(error, WorkerCrash):  # a bug, which will not be gone another time
                raise error
            raise WorkersLost(f"no worker is left: the last has died ({_sentence(error)})") from error

    def _fail(self, requests: Sequence[PromptRequest], why: str) -> None:
        """Commit rows as failed that no worker has given a result for."""
        if not requests:
            return
        settings = self._task.settings
        name = settings.card.scheduler_name
        rows = [make_row(request, "failed", why, scheduler=name, worker="parent") for request in requests]
        Manifest(settings.out, settings.run).commit(rows, settings.carried)
        for request in requests:
            if request.replaces:
                make_sink(settings.out).remove(request.replaces)
        self._committed(rows)


def error_of(peer: WorkerHandle, fate: str) -> Exception:
    """What a worker died of: an error that it told of, a bug, or something that came over it."""
    if peer.broken is None:
        if peer.exit_code == main_guard.EXIT_CODE:
            return SettingsError(main_guard.ADVICE)
        if peer.ready:
            return WorkerCrash(fate)
        return ModelError(
            f"worker {peer.rank} has died while it loaded the model ({fate}): is there memory enough for all workers?"
        )
    known = getattr(errors, peer.broken.kind, None)
    if isinstance(known, type) and issubclass(known, BatchInferError):
        return known.from_text(peer.broken.told)
    return WorkerCrash(peer.broken.trace)


def _sentence(error: Exception) -> str:
    """What a reader of one line has to know of it: of a traceback that is the last."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__
