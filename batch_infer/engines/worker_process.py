"""Run a worker's process: report its device, load the model, and render the rows that the supervisor sends.

Importing this module does not load torch, so that the process can select its GPU first.
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
from batch_infer.models import skip_quantization_libraries
from batch_infer.stopping import STOP_SIGNALS, deferred
from batch_infer.store import Store, log_handler, open_store
from batch_infer.worker import WorkerSettings, format_worker_name

if TYPE_CHECKING:
    from batch_infer.worker import ChainLoader

LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of a launcher. If they are set, accelerate makes all ranks wait for each other."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker's rank, the index of its GPU among the visible ones, and `--device`.

    `load` replaces `load_chain`. `is_child` is False if a launcher started the process.
    """

    rank: int
    gpu: int
    requested_device: str
    load: ChainLoader | None = None
    is_child: bool = True


def run_worker(connection: Connection, spec: WorkerSpec) -> None:
    """Run a worker's process until its task ends or fails, or the supervisor closes the connection or is killed."""
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
    """Render the rows that the supervisor sends. Ends the process on an error, or on a stop before its task starts.

    `localize` adapts the supervisor's settings to this machine.
    """
    select_gpu(spec)
    leave_removed_folder()
    # Off until the model is loaded: imported objects stay alive, and scanning them takes a sixth of the import time.
    gc.disable()
    with supervisor:
        supervisor.send(messages.DeviceReport(detect_device(spec.requested_device)))
        settings = localize(supervisor.wait_for_settings())
        with _logging(open_store(settings.out), spec, supervisor):
            with loading(settings):
                skip_quantization_libraries(settings.card.path, settings.card.quantize)
                load = spec.load or worker_package.load_chain
                worker = worker_package.Worker(settings, format_worker_name(spec.rank), load, supervisor.stop)
            gc.collect()
            gc.freeze()
            gc.enable()
            supervisor.send(messages.ModelLoaded())
            with deferred():
                supervisor.serve(worker)


def leave_removed_folder() -> None:
    """Change to the root if the current folder was removed, since starting a process and importing torch need one."""
    try:
        Path.cwd()
    except FileNotFoundError:
        os.chdir(os.sep)


@contextmanager
def loading(settings: WorkerSettings) -> Iterator[None]:
    """Load a model inside the context, and explain some errors. Leave the current folder first if it was removed.

    Raises StorageError if a file is not found because the current folder was removed during loading, and SettingsError
    if the device's memory is too small.
    """
    leave_removed_folder()
    try:
        with explain_out_of_memory(settings.card, settings.compute):
            yield
    except FileNotFoundError as error:
        try:
            Path.cwd()
        except FileNotFoundError:
            raise StorageError(
                "the current folder was removed while the model was loaded: change to one that exists, and run again"
            ) from error
        raise


def select_gpu(spec: WorkerSpec) -> None:
    """Hide the launcher from accelerate and, unless `gpu` is 0, other GPUs from torch, which uses GPU 0 by default."""
    for name in LAUNCHER_NAMES:
        os.environ.pop(name, None)
    if spec.gpu and spec.requested_device != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = range(spec.gpu + 1) if visible is None else visible.split(",")
        if spec.gpu < len(names):  # otherwise a launcher shows this process only its own GPU, or none
            os.environ["CUDA_VISIBLE_DEVICES"] = str(names[spec.gpu]).strip()


@contextmanager
def _logging(store: Store, spec: WorkerSpec, supervisor: SupervisorConnection) -> Iterator[None]:
    """Write log records to a file in OUT, and send them to the supervisor, which owns the terminal.

    The traceback of an error or a crash, and the output of a child process, are also written to the file.
    """
    with store.open_log(f"logs/worker-{spec.rank}.log") as file:
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
        if record.name != "batch_infer.stop":  # its records come from a signal handler, which may interrupt a send
            self._send(messages.LogMessage.from_record(record))
