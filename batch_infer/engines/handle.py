"""Start worker processes, and communicate with workers over the supervisor's end of their connections."""

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
"""Maximum delay of a stop while a process starts."""
JOIN_SECONDS = 10.0
"""Seconds to wait for the end of a process that was killed or has closed its connection."""
FLUSH_SECONDS = 1.0
"""Seconds to wait until the last messages to a launched worker are sent, before its connection is closed."""
INTERVALS = 99
"""Number of latest intervals between heartbeats. Their median is the usual interval."""

log = logging.getLogger("batch_infer")


class WorkerCrashError(RuntimeError):
    """A worker crashed without an error of this package. The message is the traceback, or how its process ended."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds without a heartbeat after which a worker counts as hung.

    `device` applies until the worker reports its device, `load` until its model is loaded, and `start` until its second
    heartbeat, since the model may be compiled before the first. After that, the limit is `factor` times the usual
    interval, but at least `least`. While stopping, it is twice the usual interval, but at least `stop`.
    """

    load: float = 3600.0
    start: float = 3600.0
    least: float = 600.0
    factor: float = 10.0
    device: float = 600.0
    stop: float = 4.0


class WorkerHandle:
    """The supervisor's view of a worker: its connection, its process if that is a child, and its state.

    Two threads send and receive, so that a worker that freezes in the middle of a message does not block the others.
    Unsent messages stay in memory. There are few, since rows are sent on request.
    """

    def __init__(self, rank: int, connection: Connection, process: BaseProcess | None = None) -> None:
        self.rank, self._connection, self._process = rank, connection, process
        self.is_child = process is not None
        self.is_required = self.is_loaded = self.is_idle = False
        """Whether the run ends if the worker cannot start, whether its model is loaded, and whether it has no rows."""
        self.report: WorkerReport | None = None
        self.error: WorkerError | None = None
        self.inbox_event = Event()
        """Set when there may be messages to receive. Workers may share an event."""
        self._silent_since = time.monotonic()
        self._intervals: deque[float] = deque(maxlen=INTERVALS)
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._inbox: SimpleQueue[FromWorker | None] = SimpleQueue()
        self._threads = [Thread(target=target, daemon=True) for target in (self._send_all, self._receive_all)]
        for thread in self._threads:
            thread.start()

    def send(self, message: ToWorker) -> None:
        """Send without waiting. If the worker has died, the message is dropped, and `receive` reports the death."""
        self._outbox.put(encode(message))

    def receive(self) -> Iterator[FromWorker]:
        """Yield the messages that have arrived. Raises EOFError if the worker has closed its connection."""
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is None:
                self._inbox.put(None)
                raise EOFError
            yield message

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
        self._intervals.append(time.monotonic() - self._silent_since)
        self.reset_silence()

    def reset_silence(self) -> None:
        """Measure silence from now on."""
        self._silent_since = time.monotonic()

    def mark_busy(self) -> None:
        """Measure silence from now on, since the worker has something to do."""
        self.is_idle = False
        self.reset_silence()

    def overdue_seconds(self, timeouts: Timeouts, *, is_stopping: bool = False) -> float | None:
        """Return the seconds since the last heartbeat if they exceed the timeout, else None."""
        if self.is_idle and not is_stopping:
            return None
        silence = time.monotonic() - self._silent_since
        # The median ignores the few intervals in which a network was compiled.
        usual = median_low(self._intervals) if self._intervals else 0.0
        if is_stopping:
            limit = max(timeouts.stop, 2 * usual)
        elif not self.is_loaded:
            limit = timeouts.load
        elif len(self._intervals) < 2:
            limit = timeouts.start
        else:
            limit = max(timeouts.least, timeouts.factor * usual)
        return silence if silence > limit else None

    def describe_exit(self) -> str:
        """Wait for the end of a child process, and return how it ended."""
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
        """Return the error of a worker that has ended: the error that it sent, or a new one that names the cause."""
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

    def kill(self) -> None:
        """Kill a child process, and close the connection, at which a launched process ends itself."""
        self._outbox.put(None)
        if self._process is None:
            self._threads[0].join(FLUSH_SECONDS)  # there may be an unsent StopTask
        else:
            self._process.kill()
            self._process.join(JOIN_SECONDS)  # a process that waits for a dead disk or device survives even SIGKILL
        shut_down(self._connection)
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        if not any(thread.is_alive() for thread in self._threads):
            self._connection.close()


def last_line(error: Exception) -> str:
    """Return the last line of an error's message. In a traceback, it is the summary."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def shut_down(connection: Connection) -> None:
    """Shut a connection down, which also wakes the threads that wait for it."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def start_worker(spec: WorkerSpec) -> WorkerHandle:
    """Start a worker's process."""
    context = get_context("spawn")  # a forked process would inherit held locks without the threads that hold them
    connection, worker_connection = context.Pipe()
    leave_removed_folder()  # a worker may be replaced hours after the start of the command
    process = context.Process(target=run_worker, args=(worker_connection, spec), name=f"batch-infer worker {spec.rank}")
    # An interrupted start would let the process print a traceback, since it could not read all of its arguments.
    with _stop_signals_blocked(), deferred(START_SECONDS):
        process.start()
    worker_connection.close()  # otherwise the connection would stay open after the end of the process
    return WorkerHandle(spec.rank, connection, process)


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Start processes with blocked stop signals. A worker unblocks them once it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # the start of the process would otherwise start it, and unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
