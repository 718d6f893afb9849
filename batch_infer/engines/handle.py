"""Start worker processes, and exchange messages with workers."""

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

from batch_infer import errors
from batch_infer.engines.messages import (
    MAX_MESSAGE_BYTES,
    FromWorker,
    ToWorker,
    WorkerError,
    decode_from_worker,
    encode,
)
from batch_infer.engines.worker_process import WorkerSpec, leave_removed_folder, run_worker
from batch_infer.errors import BatchInferError, ModelError
from batch_infer.spawning import START_SECONDS, main_module_hidden
from batch_infer.stopping import STOP_SIGNALS, deferred
from batch_infer.worker import WorkerReport

JOIN_SECONDS = 10.0
"""Maximum number of seconds to wait for a thread to end, or for a process that was killed or closed its connection."""
FLUSH_SECONDS = 1.0
"""Maximum number of seconds to wait for unsent messages to a launched worker before its connection is closed."""
INTERVALS = 99
"""Number of recent intervals between heartbeats to keep. Their median is the usual interval."""

log = logging.getLogger("batch_infer")


class WorkerCrashError(RuntimeError):
    """A worker ended with an exception that is not a BatchInferError, or hung or died after it had loaded its model.

    The message is the traceback of that exception, or else the cause.
    """


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits on a worker's silence, in seconds except for `factor`. After a longer silence, the worker counts as hung.

    `load` applies until the worker has loaded its model, and `start` until its second heartbeat, since the model may be
    compiled before the first. After that, the limit is `factor` times the usual interval, but at least `least`. Once
    the task is being stopped, the limit is twice the usual interval, but at least `stop`. `device` limits the time in
    which the first worker must report its device.
    """

    load: float = 3600.0
    start: float = 3600.0
    least: float = 600.0
    factor: float = 10.0
    device: float = 600.0
    stop: float = 4.0


class WorkerHandle:
    """The supervisor's view of a worker: its connection, its process if it is a child of this process, and its state.

    One thread sends and another receives, so that a worker that freezes in the middle of a message does not block the
    supervisor. Unsent messages stay in memory. There are few, since rows are sent on request.
    """

    def __init__(self, rank: int, connection: Connection, process: BaseProcess | None = None) -> None:
        self.rank, self._connection, self._process = rank, connection, process
        self.is_child = process is not None
        self.is_restartable = self.is_child
        """Whether the engine can kill and restart it. For a launched rank, only the launcher can."""
        self.is_required = False
        """Whether the run ends if the worker cannot start."""
        self.is_loaded = False
        """Whether the worker has loaded its model."""
        self.is_idle = False
        """Whether the worker is waiting for rows."""
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
        """Yield the messages that have arrived. Raises EOFError after the last message if no more can arrive."""
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
            log.warning("worker %d sent an invalid message and counts as dead: %s", self.rank, error)
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
        """Return the seconds of silence if they exceed the timeout, else None. Idle workers are exempt until a stop."""
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
        """Describe how a worker ended. Wait up to JOIN_SECONDS for the end of a child process."""
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
        """Return an error for a worker that has ended or hangs.

        It is based on the error that the worker sent, if any, and otherwise contains `cause` or advice.
        """
        if self.error is not None:
            known = getattr(errors, self.error.class_name, None)
            if isinstance(known, type) and issubclass(known, BatchInferError):
                return known.from_text(self.error.text)
            return WorkerCrashError(self.error.traceback)
        if self.is_loaded:
            return WorkerCrashError(cause)
        return ModelError(
            f"worker {self.rank} died while it loaded the model ({cause}): is there enough memory for all workers?"
        )

    def kill(self) -> None:
        """Kill a child process, and close the connection, which makes a launched process end."""
        self._outbox.put(None)
        if self._process is None:
            self._threads[0].join(FLUSH_SECONDS)  # let it send a pending StopTask
        else:
            self._process.kill()
            self._process.join(JOIN_SECONDS)  # with a limit, since a dead disk or device can outlast SIGKILL
        shut_down(self._connection)
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        if not any(thread.is_alive() for thread in self._threads):
            self._connection.close()


def last_line(error: Exception) -> str:
    """Return the last line of an error's message (of a traceback, its summary), or else the name of its class."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def shut_down(connection: Connection) -> None:
    """Shut down a connection, which also wakes the threads that wait for it."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def start_worker(spec: WorkerSpec) -> WorkerHandle:
    """Start a worker's process."""
    context = get_context("spawn")  # a forked process would inherit held locks without the threads that hold them
    connection, worker_connection = context.Pipe()
    leave_removed_folder()  # a worker may be replaced hours into the run, when the current folder may have been removed
    process = context.Process(target=run_worker, args=(worker_connection, spec), name=f"batch-infer worker {spec.rank}")
    # If the start were interrupted, the process could not read all of its arguments, and would print a traceback.
    with _stop_signals_blocked(), deferred(START_SECONDS), main_module_hidden():
        process.start()
    worker_connection.close()  # otherwise the connection would stay open after the end of the process
    return WorkerHandle(spec.rank, connection, process)


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block stop signals in this thread and processes that it starts. A worker unblocks them once it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # otherwise `Process.start` would start it, and that unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
