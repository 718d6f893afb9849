"""A worker's process: it finds its device, loads the model, and renders what it is handed until it is told to stop.

What it imports at its start is torch-free: which GPU it sees is settled first.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from batch_infer.engines.messages import (
    MOST_BYTES,
    Alive,
    Begin,
    Broken,
    Committed,
    Ended,
    Found,
    FromWorker,
    Idle,
    Logged,
    Ready,
    Rows,
    Stop,
    ToWorker,
    Wants,
    decode_to_worker,
    encodable,
    encode,
)
from batch_infer.errors import StorageError
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.stopping import STOP_SIGNALS, deferred
from batch_infer.store import log_handler, open_log
from batch_infer.worker import WorkerSettings, format_worker_name

if TYPE_CHECKING:
    from batch_infer.worker import ChainLoader, Worker

BEAT_SECONDS = 1.0
"""How often a worker says that it is alive, while it is."""
LISTEN_SECONDS = 0.5
"""How often it looks, while it waits for the parent, whether to stop."""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables of a launcher, by which accelerate would have all ranks wait for each other."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Which worker this is, which of the visible GPUs is its own, and the --device that was asked for.

    `load` loads what renders, where that is not the model of the settings. `ours`: the process was started by this
    package, and not by a launcher.
    """

    rank: int
    gpu: int
    asked: str
    load: ChainLoader | None = None
    ours: bool = True


def live(link: Connection, seat: WorkerSpec) -> None:
    """The life of a worker's process of its own. It ends when the other end of the link does, however that comes."""
    for number in STOP_SIGNALS:  # these are the parent's, which tells us to stop
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    work(Parent(link), seat)


def work(
    parent: Parent, seat: WorkerSpec, own: Callable[[WorkerSettings], WorkerSettings] = lambda settings: settings
) -> None:
    """Render what the parent hands out. Ends the process where it cannot go on.

    `own` makes the parent's settings those of this machine.
    """
    keep_to(seat)
    leave_removed_folder()
    # Objects that imports create stay alive; scanning them for garbage takes a sixth of the import time.
    gc.disable()
    with parent:
        from batch_infer.autotune import find_device

        parent.send(Found(find_device(seat.asked)))
        settings = own(parent.settings())
        with _logged(settings.out.path, seat, parent):
            with loading():
                worker = _load(settings, seat, parent)
            gc.collect()
            gc.freeze()
            gc.enable()
            parent.send(Ready())
            with deferred():
                parent.serve(worker)


def leave_removed_folder() -> None:
    """Change to the root where the current folder was removed: importing torch and starting a process need one."""
    try:
        Path.cwd()
    except FileNotFoundError:
        os.chdir(os.sep)


@contextmanager
def loading() -> Iterator[None]:
    """Load a model though the current folder was removed. Raises StorageError where it is removed meanwhile."""
    leave_removed_folder()
    try:
        yield
    except FileNotFoundError as error:
        try:
            Path.cwd()
        except FileNotFoundError:
            message = (
                "the current folder was removed while the model was loaded: change to one that exists, and run again"
            )
            raise StorageError(message) from error
        raise


def keep_to(seat: WorkerSpec) -> None:
    """See one GPU and no launcher. The first GPU is every process's own without a word."""
    for name in LAUNCHED:
        os.environ.pop(name, None)
    if seat.gpu and seat.asked != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = range(seat.gpu + 1) if visible is None else visible.split(",")
        if seat.gpu < len(names):  # else a launcher has given this process its own, or none
            os.environ["CUDA_VISIBLE_DEVICES"] = str(names[seat.gpu]).strip()


def _load(settings: WorkerSettings, seat: WorkerSpec, parent: Parent) -> Worker:
    import torch

    from batch_infer.autotune import explain_out_of_memory
    from batch_infer.worker import Worker

    if seat.load is None:
        from batch_infer.worker import load_chain
    try:
        return Worker(settings, format_worker_name(seat.rank), seat.load or load_chain, parent.stops)
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory(error) from error


class Parent:
    """The one who hands out rows, as a worker sees it. Left with an error, it is told of it and the process ends."""

    def __init__(self, link: Connection, stop: Callable[[], bool] = lambda: False) -> None:
        """`stop` says whether this process was told to stop by another than the parent."""
        self._link, self._sending, self._stop = link, Lock(), stop
        self._inbox: queue.Queue[ToWorker] = queue.Queue()
        self._begun, self._stopped, self._over = Event(), Event(), Event()
        self._beaten: float | None = None
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                message = decode_to_worker(self._link.recv_bytes(MOST_BYTES))
                if isinstance(message, Stop):
                    self._stopped.set()
                    if not self._begun.is_set():  # we came too late, and end by ourselves
                        self._over.set()
                        return
                self._inbox.put(message)
        except (EOFError, OSError, msgspec.DecodeError):
            pass
        finally:
            if not self._over.is_set():  # nobody is there who would take what we render
                os._exit(1)

    def send(self, message: FromWorker) -> None:
        content = encode(message)
        try:
            with self._sending:
                self._link.send_bytes(content)
        except OSError:
            os._exit(1)

    def stops(self) -> bool:
        """Whether to stop; it is asked at every step, which is how the parent knows that this process is alive."""
        now = time.monotonic()
        if self._beaten is None:  # nothing is done yet
            self._beaten = now
        elif now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            self.send(Alive())
        return self._stopped.is_set() or self._stop()

    def settings(self) -> WorkerSettings:
        """What to render with. Ends the process where it is told to stop before."""
        message = self._next()
        if not isinstance(message, Begin):
            sys.exit(0)
        self._begun.set()
        return message.settings

    def _next(self) -> ToWorker:
        """What the parent says next; to stop, where that has been said in the meantime."""
        while not (self._stopped.is_set() or self._stop()):
            try:
                return self._inbox.get(timeout=LISTEN_SECONDS)
            except queue.Empty:
                pass
        return Stop()

    def serve(self, worker: Worker) -> None:
        """Render chunks until the parent has no more."""

        def committed(rows: Sequence[ResultRow]) -> None:
            bare = [replace(row, prompt=None, negative_prompt=None, carried={}) for row in rows]
            self.send(Committed(bare, worker.report()))

        while not self.stops():
            self.send(Idle())
            message = self._next()
            if not isinstance(message, Rows):
                break
            worker.render(message.chunk().requests if message.apart else self._stream(message), committed)
        account = worker.report(final=True)
        self._over.set()
        self.send(Ended(account))

    def _stream(self, first: Rows) -> Iterator[PromptRequest]:
        """The rows of chunk after chunk: the next one is asked for before it is needed, so that no slot waits."""
        message: ToWorker = first
        while isinstance(message, Rows):
            self.send(Wants())
            yield from message.chunk().requests
            message = self._next()

    def __enter__(self) -> Parent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):  # a launcher's rank that is stopped before it renders
            self._over.set()
            self.send(Ended(None))
        elif error is not None and not isinstance(error, SystemExit):
            from batch_infer.errors import BatchInferError

            known = isinstance(error, BatchInferError)
            told = "" if known else "".join(traceback.format_exception(error))
            self.send(Broken(type(error).__name__, encodable(str(error)), encodable(told)))
            os._exit(1)  # without a second traceback, and without waiting for threads of ours


@contextmanager
def _logged(out: Path, seat: WorkerSpec, parent: Parent) -> Iterator[None]:
    """Keep what is logged in OUT, with the traceback of an error and of a crash that no code survives.

    Log records go to the parent too. What else a process of ours would print does not: the terminal is the parent's.
    """
    with open_log(out / "logs" / f"worker-{seat.rank}.log") as file:
        faulthandler.enable(file)
        if seat.ours:
            for standard in (1, 2):
                os.dup2(file.fileno(), standard)
        logging.captureWarnings(True)
        loggers = [logging.getLogger(name) for name in ("batch_infer", "py.warnings")]
        for logger in loggers:
            logger.handlers = [log_handler(file), _Forward(parent.send)]
            logger.propagate = False
        loggers[0].setLevel(logging.DEBUG)
        try:
            yield
        finally:
            for logger in loggers:
                logger.handlers = []
            faulthandler.disable()


class _Forward(QueueHandler):
    """Sends log records to the parent, whose terminal it is."""

    def __init__(self, send: Callable[[Logged], None]) -> None:
        super().__init__(queue.Queue())
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        if record.name != "batch_infer.stop":  # said in a signal handler, which may have interrupted another sending
            self._send(Logged.of(record))
