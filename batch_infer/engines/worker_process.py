"""A worker's process: it reports its device, loads the model, and renders the rows that the supervisor sends.

What this module imports at its start loads no torch, so that the process can choose its GPU first.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import queue
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from batch_infer import worker as worker_package
from batch_infer.autotune import detect_device, explain_out_of_memory
from batch_infer.engines import messages
from batch_infer.engines.connection import SupervisorConnection
from batch_infer.errors import StorageError
from batch_infer.stopping import STOP_SIGNALS, deferred
from batch_infer.store import log_handler, open_log
from batch_infer.worker import WorkerSettings, format_worker_name

if TYPE_CHECKING:
    from batch_infer.worker import ChainLoader

LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables with which accelerate would have all ranks wait for each other."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker's rank, the index of its GPU among the visible ones, and `--device`.

    `load` replaces the loader of the model. `is_child`: this package has started the process, not a launcher.
    """

    rank: int
    gpu: int
    requested_device: str
    load: ChainLoader | None = None
    is_child: bool = True


def run_worker(connection: Connection, spec: WorkerSpec) -> None:
    """Run a worker's process until it is done or the other end of the connection is closed, even by a kill."""
    for number in STOP_SIGNALS:  # the parent handles these, and sends StopTask
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    work(SupervisorConnection(connection), spec)


def work(
    supervisor: SupervisorConnection,
    spec: WorkerSpec,
    localize: Callable[[WorkerSettings], WorkerSettings] = lambda settings: settings,
) -> None:
    """Render what the supervisor sends. Ends the process on an error.

    `localize` adapts the supervisor's settings to this machine.
    """
    select_gpu(spec)
    leave_removed_folder()
    # Objects that imports create stay alive; scanning them for garbage takes a sixth of the import time.
    gc.disable()
    with supervisor:
        supervisor.send(messages.DeviceReport(detect_device(spec.requested_device)))
        settings = localize(supervisor.wait_for_settings())
        with _logging(settings.out.path, spec, supervisor):
            with loading():
                load = spec.load or worker_package.load_chain
                worker = worker_package.Worker(settings, format_worker_name(spec.rank), load, supervisor.stop)
            gc.collect()
            gc.freeze()
            gc.enable()
            supervisor.send(messages.ModelLoaded())
            with deferred():
                supervisor.serve(worker)


def leave_removed_folder() -> None:
    """Change to the root if the current folder was removed: importing torch and starting a process need one."""
    try:
        Path.cwd()
    except FileNotFoundError:
        os.chdir(os.sep)


@contextmanager
def loading() -> Iterator[None]:
    """Load a model even if the current folder was removed.

    Raises StorageError if the folder is removed meanwhile, SettingsError if the device's memory is too small.
    """
    leave_removed_folder()
    try:
        with explain_out_of_memory():
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


def select_gpu(spec: WorkerSpec) -> None:
    """Hide other GPUs and the launcher from torch and accelerate. The first GPU is the default of every process."""
    for name in LAUNCHER_NAMES:
        os.environ.pop(name, None)
    if spec.gpu and spec.requested_device != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = range(spec.gpu + 1) if visible is None else visible.split(",")
        if spec.gpu < len(names):  # otherwise a launcher has shown this process its own GPU, or none
            os.environ["CUDA_VISIBLE_DEVICES"] = str(names[spec.gpu]).strip()


@contextmanager
def _logging(out: Path, spec: WorkerSpec, supervisor: SupervisorConnection) -> Iterator[None]:
    """Write log records to a file in OUT and send them to the supervisor, which owns the terminal.

    The file also gets the traceback of an error or a crash, and what a child process prints.
    """
    with open_log(out / "logs" / f"worker-{spec.rank}.log") as file:
        faulthandler.enable(file)
        if spec.is_child:
            for standard in (1, 2):
                os.dup2(file.fileno(), standard)
        logging.captureWarnings(True)
        loggers = [logging.getLogger(name) for name in ("batch_infer", "py.warnings")]
        for logger in loggers:
            logger.handlers = [log_handler(file), _LogForwarder(supervisor.send)]
            logger.propagate = False
        loggers[0].setLevel(logging.DEBUG)
        try:
            yield
        finally:
            for logger in loggers:
                logger.handlers = []
            faulthandler.disable()


class _LogForwarder(QueueHandler):
    """Sends log records to the supervisor."""

    def __init__(self, send: Callable[[messages.LogMessage], None]) -> None:
        super().__init__(queue.Queue())
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        if record.name != "batch_infer.stop":  # logged in a signal handler, which may have interrupted a send
            self._send(messages.LogMessage.from_record(record))
