"""A worker as the one who hands out rows sees it: a link, and the process at its other end where that is ours."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from batch_infer.engines.messages import Broken, FromWorker, ToWorker
from batch_infer.engines.rank import Seat, leave_removed_folder, live
from batch_infer.links import received, send
from batch_infer.stopping import STOP_SIGNALS
from batch_infer.worker import Account

PATIENT_SECONDS = 10.0
"""How long a process is waited for that has been killed, or should have ended."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How many seconds a worker may go without a sign that its device has come a step further.

    `device` until its device is known; `load` until the model is loaded; `start` until the first sign, for something
    may have to be compiled; after that the most of `least`, `factor` times the longest step, and `first_factor` times
    the first one, which may have included compiling.
    """

    load: float = 3600.0
    start: float = 3600.0
    least: float = 600.0
    factor: float = 10.0
    first_factor: float = 2.0
    device: float = 600.0


class Peer:
    """A worker, and what is known of this life of its process."""

    def __init__(self, rank: int, link: Connection, process: BaseProcess | None = None) -> None:
        self.rank, self.link, self._process = rank, link, process
        self.ours = process is not None
        self.ready = self.waiting = False
        """Whether the model is loaded; whether it has nothing to do."""
        self.account: Account | None = None
        self.broken: Broken | None = None
        self._signed = False
        self._is_first_interval = True
        self._last = time.monotonic()
        self._longest = self._longest_first = 0.0

    def send(self, message: ToWorker) -> None:
        """To a worker that has died it goes nowhere: the link's other direction says so."""
        send(self.link, message)

    def receive(self) -> Iterator[FromWorker]:
        """What it has said since. Raises EOFError where it has died, or ended."""
        return received(self.link)

    def note_sign(self) -> None:
        """Its device has come a step further."""
        now = time.monotonic()
        if self._is_first_interval:
            self._longest_first = max(self._longest_first, now - self._last)
        else:
            self._longest = max(self._longest, now - self._last)
        self._signed, self._is_first_interval, self._last = True, False, now

    def rest(self) -> None:
        """It has nothing to do, and that is no sign of anything."""
        self.waiting = True

    def begin(self) -> None:
        """It has something to do from here on."""
        self.waiting = False
        self._is_first_interval = True
        self.forgive()

    def forgive(self) -> None:
        """It may have been silent until now."""
        self._last = time.monotonic()

    def silence(self, patience: Patience) -> float | None:
        """For how many seconds it has been silent, where that is longer than it may be."""
        if self.waiting:
            return None
        silent = time.monotonic() - self._last
        return silent if silent > self._limit(patience) else None

    def _limit(self, patience: Patience) -> float:
        if not self.ready:
            return patience.load
        if not self._signed:
            return patience.start
        by_pace = max(patience.factor * self._longest, patience.first_factor * self._longest_first)
        return max(patience.least, by_pace)

    def fate(self) -> str:
        """How its process ended, as far as we know."""
        if self._process is None:
            return "its connection broke"
        self._process.join(PATIENT_SECONDS)
        code = self._process.exitcode
        if code is None:
            return "it closed its connection"
        if code >= 0:
            return f"exit code {code}"
        known = {number.value: number.name for number in signal.Signals}
        return f"killed by {known.get(-code, f'signal {-code}')}"

    def kill(self) -> None:
        """End it at once. A process that is not ours ends by itself when its link does."""
        if self._process is not None:
            self._process.kill()
            self._process.join(PATIENT_SECONDS)  # one that waits for a dead disk or device cannot even be killed
        self.link.close()


def start(seat: Seat) -> Peer:
    """Start a worker's process."""
    context = get_context("spawn")  # a fork would share the parent's threads and locks
    ours, theirs = context.Pipe()
    leave_removed_folder()  # a worker may be replaced hours after the command began
    process = context.Process(target=live, args=(theirs, seat), name=f"batch-infer worker {seat.rank}")
    with _unheard():
        process.start()
    theirs.close()  # so that ours says when the process has ended
    return Peer(seat.rank, ours, process)


@contextmanager
def _unheard() -> Iterator[None]:
    """Have a process that is started here deaf to what stops commands, until it says how it takes that."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # or it would be started in here, and open the ears again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
