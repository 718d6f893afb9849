"""Connect a worker to the supervisor: exchange messages, send heartbeats, and render the rows that arrive."""

from __future__ import annotations

import os
import queue
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

import msgspec

from batch_infer.engines import messages
from batch_infer.engines.messages import escape_surrogates
from batch_infer.errors import BatchInferError
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.worker import WorkerSettings

if TYPE_CHECKING:
    from batch_infer.worker import Worker

HEARTBEAT_SECONDS = 1.0
"""Minimum number of seconds between heartbeats."""
LISTEN_SECONDS = 0.5
"""Maximum number of seconds between checks for a stop while a worker waits for a message."""


class SupervisorConnection:
    """A worker's end of its connection.

    If an error leaves the context, the connection reports it and ends the process. It only reports a KeyboardInterrupt,
    as a normal end.
    """

    def __init__(self, connection: Connection, stop: Callable[[], bool] = lambda: False) -> None:
        """`stop` returns whether to stop even if the supervisor has not sent StopTask."""
        self._connection, self._send_lock, self._stop = connection, Lock(), stop
        self._inbox: queue.Queue[messages.ToWorker] = queue.Queue()
        self._has_task, self._is_stopped, self._is_done = Event(), Event(), Event()
        self._last_heartbeat: float | None = None
        Thread(target=self._receive_all, daemon=True).start()

    def _receive_all(self) -> None:
        try:
            while True:
                message = messages.decode_to_worker(self._connection.recv_bytes(messages.MAX_MESSAGE_BYTES))
                if isinstance(message, messages.StopTask):
                    self._is_stopped.set()
                    if not self._has_task.is_set():  # then `wait_for_settings` ends the process
                        self._is_done.set()
                        return
                self._inbox.put(message)
        except (EOFError, OSError, msgspec.DecodeError):
            pass
        finally:
            if not self._is_done.is_set():  # the supervisor died, closed the connection or sent an invalid message
                os._exit(1)

    def send(self, message: messages.FromWorker) -> None:
        content = messages.encode(message)
        try:
            with self._send_lock:
                self._connection.send_bytes(content)
        except OSError:
            os._exit(1)

    def stop(self) -> bool:
        """Return whether to stop. The chain calls this before each denoiser call, so it also sends heartbeats."""
        now = time.monotonic()
        if self._last_heartbeat is None:  # the first call precedes the first step, and only starts the clock
            self._last_heartbeat = now
        elif now - self._last_heartbeat >= HEARTBEAT_SECONDS:
            self._last_heartbeat = now
            self.send(messages.Heartbeat())
        return self._is_stopped.is_set() or self._stop()

    def wait_for_settings(self) -> WorkerSettings:
        """Return the settings of the task. Ends the process if a stop is requested before they arrive."""
        message = self._wait_for_message()
        if not isinstance(message, messages.StartTask):
            sys.exit(0)
        self._has_task.set()
        return message.settings

    def _wait_for_message(self) -> messages.ToWorker:
        """Return the next message, or StopTask as soon as a stop is requested."""
        while not (self._is_stopped.is_set() or self._stop()):
            try:
                return self._inbox.get(timeout=LISTEN_SECONDS)
            except queue.Empty:
                pass
        return messages.StopTask()

    def serve(self, worker: Worker) -> None:
        """Render chunks until the supervisor has no more or a stop is requested, and then send the final report."""

        def report_commit(rows: Sequence[ResultRow]) -> None:
            bare_rows = [replace(row, prompt=None, negative_prompt=None, carried={}) for row in rows]
            self.send(messages.CommitReport(bare_rows, worker.report()))

        while not self.stop():
            self.send(messages.WorkerIdle())
            message = self._wait_for_message()
            if not isinstance(message, messages.RowChunk):
                break
            worker.render(message.to_chunk().requests if message.is_isolated else self._stream(message), report_commit)
        report = worker.report(final=True)
        self._is_done.set()
        self.send(messages.WorkerDone(report))

    def _stream(self, first: messages.RowChunk) -> Iterator[PromptRequest]:
        """Yield the rows of `first` and of later chunks, which are requested early so that no slot stays empty."""
        message: messages.ToWorker = first
        while isinstance(message, messages.RowChunk):
            self.send(messages.RowRequest())
            yield from message.to_chunk().requests
            message = self._wait_for_message()

    def __enter__(self) -> SupervisorConnection:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):  # a launched rank received a stop signal
            self._is_done.set()
            self.send(messages.WorkerDone(None))
        elif error is not None and not isinstance(error, SystemExit):
            details = "" if isinstance(error, BatchInferError) else "".join(traceback.format_exception(error))
            text, details = escape_surrogates(str(error)), escape_surrogates(details)
            self.send(messages.WorkerError(type(error).__name__, text, details))
            os._exit(1)  # without a second traceback, and without waiting for threads
