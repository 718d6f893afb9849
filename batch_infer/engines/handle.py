"""The worker handle: the supervisor's end of a worker's connection, and the worker's process if it is a child."""

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

from batch_infer import errors, main_guard
from batch_infer.engines.messages import (
    MAX_MESSAGE_BYTES,
    FromWorker,
    ToWorker,
    WorkerError,
    decode_from_worker,
    encode,
)
from batch_infer.engines.worker_process import WorkerSpec, leave_removed_folder, run_worker
from batch_infer.errors import BatchInferError, ModelError, SettingsError
from batch_infer.stopping import STOP_SIGNALS, deferred
from batch_infer.worker import WorkerReport

START_SECONDS = 1.0
"""How long a stop is deferred while a process starts."""
JOIN_SECONDS = 10.0
"""How long to wait for a process that was killed or should have ended."""
FLUSH_SECONDS = 1.0
"""How long sending the last messages to another machine may take before its connection is closed."""
INTERVALS = 99
"""Number of latest intervals between heartbeats whose median is the usual interval."""

log = logging.getLogger("batch_infer")


class WorkerCrashError(RuntimeError):
    """A worker has crashed without an error of this package. The message is the traceback, or how its process ended."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that a worker may go without a heartbeat.

    `device`: until its device is known. `load`: until the model is loaded. `start`: until the second heartbeat, since
    something may have to be compiled before the first. After that: the larger of `least` and `factor` times the usual
    interval. While stopping: the larger of `stop` and twice the usual interval.
    """

    load: float = 3600.0
    start: float = 3600.0
    least: float = 600.0
    factor: float = 10.0
    device: float = 600.0
    stop: float = 4.0


class WorkerHandle:
    """The supervisor's view of a worker: its connection, its process if that is a child, and its state.

    Threads send and receive, so that a worker that freezes in the middle of a message blocks no other. Unsent messages
    stay in memory, which is little, since rows are sent on request.
    """

    def __init__(self, rank: int, connection: Connection, process: BaseProcess | None = None) -> None:
        self.rank, self._connection, self._process = rank, connection, process
        self.is_child = process is not None
        self.is_loaded = self.is_idle = False
        """Whether the model is loaded; whether the worker has no rows."""
        self.report: WorkerReport | None = None
        self.error: WorkerError | None = None
        self.inbox_event = Event()
        """Set when there may be messages to receive."""
        self._last_sign = time.monotonic()
        self._intervals: deque[float] = deque(maxlen=INTERVALS)
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._inbox: SimpleQueue[FromWorker | None] = SimpleQueue()
        self._threads = [Thread(target=target, daemon=True) for target in (self._send_all, self._receive_all)]
        for thread in self._threads:
            thread.start()

    def send(self, message: ToWorker) -> None:
        """Send without waiting. A message to a worker that has died is dropped; `receive` reports the death."""
        self._outbox.put(encode(message))

    def receive(self) -> Iterator[FromWorker]:
        """Yield the messages that have arrived. Raises EOFError if the worker has closed its connection."""
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is None:
                self._inbox.put(None)
                raise EOFError
            yield message

    def share_inbox_event(self, event: Event) -> None:
        """Set this event from now on, which several workers may share."""
        self.inbox_event = event
        event.set()

    def _send_all(self) -> None:
        with suppress(OSError):
            while (content := self._outbox.get()) is not None:
                self._connection.send_bytes(content)

    def _receive_all(self) -> None:
        try:
            while True:
                self._inbox.put(decode_from_worker(self._connection.recv_bytes(MAX_MESSAGE_BYTES)))
                self.inbox_event.set()
        except (EOFError, OSError):
            pass
        except msgspec.DecodeError as error:
            log.warning("worker %d sent an invalid message; its connection is closed: %s", self.rank, error)
        finally:
            self._outbox.put(None)
            self._inbox.put(None)
            self.inbox_event.set()

    def record_heartbeat(self) -> None:
        now = time.monotonic()
        self._intervals.append(now - self._last_sign)
        self._last_sign = now

    def reset_silence(self) -> None:
        """Measure silence from now on."""
        self._last_sign = time.monotonic()

    def mark_busy(self) -> None:
        """Measure silence from now on: the worker has something to do."""
        self.is_idle = False
        self.reset_silence()

    def overdue_seconds(self, timeouts: Timeouts, *, is_stopping: bool = False) -> float | None:
        """Return the seconds since the last heartbeat if they exceed the timeout, else None."""
        if self.is_idle and not is_stopping:
            return None
        silence = time.monotonic() - self._last_sign
        # The median, since a few intervals are longer because a network was compiled in them.
        usual = median_low(self._intervals) if self._intervals else 0.0
        limit = max(timeouts.stop, 2 * usual) if is_stopping else self._limit(timeouts, usual)
        return silence if silence > limit else None

    def _limit(self, timeouts: Timeouts, usual: float) -> float:
        if not self.is_loaded:
            return timeouts.load
        if len(self._intervals) < 2:
            return timeouts.start
        return max(timeouts.least, timeouts.factor * usual)

    def describe_exit(self) -> str:
        """Return how the process ended, as far as it is known. Waits for it to end."""
        if self._process is None:
            return "its connection broke"
        self._process.join(JOIN_SECONDS)
        code = self._process.exitcode
        if code is None:
            return "it closed its connection"
        if code >= 0:
            return f"exit code {code}"
        with suppress(ValueError):  # not every signal has a name
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"

    def exit_error(self, cause: str) -> Exception:
        """Return the error to raise for a worker that has ended: its own, or one that names the cause."""
        if self.error is not None:
            known = getattr(errors, self.error.class_name, None)
            if isinstance(known, type) and issubclass(known, BatchInferError):
                return known.from_text(self.error.text)
            return WorkerCrashError(self.error.traceback)
        if self._process is not None and self._process.exitcode == main_guard.EXIT_CODE:
            return SettingsError(main_guard.ADVICE)
        if self.is_loaded:
            return WorkerCrashError(cause)
        return ModelError(
            f"worker {self.rank} died while it loaded the model ({cause}): is there enough memory for all workers?"
        )

    def send_kill(self) -> None:
        """Kill a child process without waiting for its end."""
        if self._process is not None:
            self._process.kill()

    def kill(self) -> None:
        """Kill a child process and close the connection, at which a process that is no child ends by itself."""
        self.send_kill()
        self._outbox.put(None)
        if self._process is None:
            self._threads[0].join(FLUSH_SECONDS)  # a StopTask may not be sent yet
        else:
            self._process.join(JOIN_SECONDS)  # one that waits for a dead disk or device cannot even be killed
        shut_down(self._connection)
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        if not any(thread.is_alive() for thread in self._threads):
            self._connection.close()


def last_line(error: Exception) -> str:
    """Return the last line of an error's message, which summarizes a traceback."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def shut_down(connection: Connection) -> None:
    """End a connection, also for a thread that is waiting for it."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def start_worker(spec: WorkerSpec) -> WorkerHandle:
    """Start a worker's process."""
    context = get_context("spawn")  # a fork would share the parent's threads and locks
    connection, worker_connection = context.Pipe()
    leave_removed_folder()  # a worker may be replaced hours after the command began
    process = context.Process(target=run_worker, args=(worker_connection, spec), name=f"batch-infer worker {spec.rank}")
    # A process whose start is interrupted would print a traceback, since it reads half of what it is sent.
    with _stop_signals_blocked(), deferred(START_SECONDS):
        process.start()
    worker_connection.close()  # otherwise the connection would stay open when the process has ended
    return WorkerHandle(spec.rank, connection, process)


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block the stop signals of a process that is started here until it handles them itself."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # otherwise it would be started in here, and unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
