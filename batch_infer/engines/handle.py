"""A worker as the one who hands out rows sees it: a link, and the process at its other end where that is ours."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from statistics import median_low
from threading import Event, Thread

import msgspec

from batch_infer.engines.messages import MOST_BYTES, Broken, FromWorker, ToWorker, decode_from_worker, encode
from batch_infer.engines.worker_process import WorkerSpec, leave_removed_folder, live
from batch_infer.stopping import STOP_SIGNALS, deferred
from batch_infer.worker import WorkerReport

START_SECONDS = 1.0
"""How long a stop waits for a process that is being started."""
PATIENT_SECONDS = 10.0
"""How long a process is waited for that has been killed, or should have ended."""
FLUSH_SECONDS = 1.0
"""How long the last messages to a process of another machine may take before its connection is closed."""
INTERVALS = 99
"""Of so many intervals between signs the median is the usual one."""

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How many seconds a worker may go without a sign that its device has come a step further.

    `device` until its device is known; `load` until the model is loaded; `start` until the second sign, for something
    may have to be compiled before the first; after that the most of `least` and `factor` times the usual interval.
    Once it is to stop, the most of `stop` and twice the usual interval.
    """

    load: float = 3600.0
    start: float = 3600.0
    least: float = 600.0
    factor: float = 10.0
    device: float = 600.0
    stop: float = 4.0


class WorkerHandle:
    """A worker, and what is known of this life of its process.

    Threads send and receive, so that a worker that is frozen in the middle of a message blocks no other. What is sent
    waits in memory; that is little, for rows go out on request.
    """

    def __init__(self, rank: int, link: Connection, process: BaseProcess | None = None) -> None:
        self.rank, self._link, self._process = rank, link, process
        self.ours = process is not None
        self.ready = self.waiting = False
        """Whether the model is loaded; whether it has nothing to do."""
        self.account: WorkerReport | None = None
        self.broken: Broken | None = None
        self.news = Event()
        """Set when there is something to receive."""
        self._last = time.monotonic()
        self._intervals: deque[float] = deque(maxlen=INTERVALS)
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._inbox: SimpleQueue[FromWorker | None] = SimpleQueue()
        self._threads = [Thread(target=target, daemon=True) for target in (self._send_all, self._receive_all)]
        for thread in self._threads:
            thread.start()

    def send(self, message: ToWorker) -> None:
        """Send without waiting. To a worker that has died it goes nowhere: `receive` says so."""
        self._outbox.put(encode(message))

    def receive(self) -> Iterator[FromWorker]:
        """Give what it has sent since. Raises EOFError where it has died, or ended."""
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is None:
                self._inbox.put(None)
                raise EOFError
            yield message

    def notify(self, news: Event) -> None:
        """Set this event from here on when there is something to receive."""
        self.news = news
        news.set()

    def _send_all(self) -> None:
        with suppress(OSError):
            while (content := self._outbox.get()) is not None:
                self._link.send_bytes(content)

    def _receive_all(self) -> None:
        try:
            while True:
                self._inbox.put(decode_from_worker(self._link.recv_bytes(MOST_BYTES)))
                self.news.set()
        except (EOFError, OSError):
            pass
        except msgspec.DecodeError as error:
            log.warning("worker %d sent what is no message, and is not heard any more: %s", self.rank, error)
        finally:
            self._outbox.put(None)
            self._inbox.put(None)
            self.news.set()

    def note_sign(self) -> None:
        """Its device has come a step further."""
        now = time.monotonic()
        self._intervals.append(now - self._last)
        self._last = now

    def rest(self) -> None:
        """It has nothing to do, and that is no sign of anything."""
        self.waiting = True

    def begin(self) -> None:
        """It has something to do from here on."""
        self.waiting = False
        self.forgive()

    def forgive(self) -> None:
        """It may have been silent until now."""
        self._last = time.monotonic()

    def silence(self, patience: Timeouts, *, is_stopping: bool = False) -> float | None:
        """Return for how many seconds it has been silent, where that is longer than it may be."""
        if self.waiting and not is_stopping:
            return None
        silent = time.monotonic() - self._last
        # The median: few intervals are longer because a network was compiled in them.
        usual = median_low(self._intervals) if self._intervals else 0.0
        limit = max(patience.stop, 2 * usual) if is_stopping else self._limit(patience, usual)
        return silent if silent > limit else None

    def _limit(self, patience: Timeouts, usual: float) -> float:
        if not self.ready:
            return patience.load
        if len(self._intervals) < 2:
            return patience.start
        return max(patience.least, patience.factor * usual)

    @property
    def exit_code(self) -> int | None:
        """Of its process, where that is ours and has ended."""
        return None if self._process is None else self._process.exitcode

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

    def end(self) -> None:
        """Have its process end at once, without waiting for that."""
        if self._process is not None:
            self._process.kill()

    def kill(self) -> None:
        """End it at once. A process that is not ours ends by itself when its link does."""
        self.end()
        self._outbox.put(None)
        if self._process is None:
            self._threads[0].join(FLUSH_SECONDS)  # the stop may still be on its way
        else:
            self._process.join(PATIENT_SECONDS)  # one that waits for a dead disk or device cannot even be killed
        hang_up(self._link)
        for thread in self._threads:
            thread.join(PATIENT_SECONDS)
        if not any(thread.is_alive() for thread in self._threads):
            self._link.close()


def hang_up(link: Connection) -> None:
    """End a connection, also for a thread that waits for it."""
    with suppress(OSError), socket.socket(fileno=os.dup(link.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def start(seat: WorkerSpec) -> WorkerHandle:
    """Start a worker's process."""
    context = get_context("spawn")  # a fork would share the parent's threads and locks
    ours, theirs = context.Pipe()
    leave_removed_folder()  # a worker may be replaced hours after the command began
    process = context.Process(target=live, args=(theirs, seat), name=f"batch-infer worker {seat.rank}")
    # A process whose start is interrupted would read half of what it is sent, and print a traceback.
    with _unheard(), deferred(START_SECONDS):
        process.start()
    theirs.close()  # so that ours says when the process has ended
    return WorkerHandle(seat.rank, ours, process)


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
