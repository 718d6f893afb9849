"""Run a worker process, which imports the scoring script as Azure does and runs the mini-batches that it receives."""

from __future__ import annotations

import importlib.util
import inspect
import os
import queue
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn, TypeAlias

from batch_infer.simulation.schedule import MiniBatch

MODULE = "entry_script"
"""Module name of the script, instead of its file name, which could be that of a module that it imports."""


class Event(Enum):
    """Messages without content: init() has returned, or run() is about to be called."""

    READY = auto()
    RUN_STARTED = auto()


@dataclass(frozen=True, slots=True)
class RunReturned:
    """run() has returned `rows` rows. Their `text` goes to predictions.csv, after `header` if the file is empty."""

    rows: int
    header: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class ScriptFailed:
    """The import, init() or run() of the script has raised an exception, or run() has returned an invalid result."""

    traceback: str


MessageFromWorker: TypeAlias = "Event | RunReturned | ScriptFailed"


def run_worker(descriptor: int, path: str, to_csv: Mapping[str, Any] | None) -> None:
    """Run the script at `path` until the parent requests shutdown or closes the connection. Exit if it does not start.

    `descriptor` is the connection's file descriptor. `to_csv` contains the arguments of DataFrame.to_csv, or is None if
    no rows are written.
    """
    os.set_inheritable(descriptor, False)  # otherwise processes that the script starts would keep it open
    parent = ParentConnection(Connection(descriptor))
    script = None
    with parent:
        script = _start_script(Path(path))
    if script is None:
        sys.exit(1)
    parent.send(Event.READY)
    while (mini_batch := parent.inbox.get()) is not None:
        parent.send(Event.RUN_STARTED)
        with parent:
            arguments = [list(mini_batch.files), SimpleNamespace(minibatch_index=mini_batch.index)]
            takes_context = len(inspect.signature(script.run).parameters) > 1
            parent.send(_format_rows(script.run(*arguments[: 2 if takes_context else 1]), to_csv))
    if callable(shutdown := getattr(script, "shutdown", None)):
        shutdown()


def _start_script(path: Path) -> ModuleType:
    """Import a script and call its init(). Raises ImportError, AttributeError, and any exception of the script."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    if not path.with_name("__init__.py").exists():  # the modules of a package could hide libraries of the same name
        sys.path.insert(0, str(path.parent))  # the script may import modules from its folder
    module = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("init", "run"):
        if not callable(getattr(module, name, None)):
            raise AttributeError(f"{path} has no function {name}()")
    module.init()
    return module


def _format_rows(result: Any, to_csv: Mapping[str, Any] | None) -> RunReturned:
    """Count the rows that run() returned, and format them unless `to_csv` is None.

    Raises TypeError unless run() returned a list or a DataFrame.
    """
    if isinstance(result, list):
        return RunReturned(len(result), text="" if to_csv is None else "".join(f"{item}\n" for item in result))
    pandas = sys.modules.get("pandas")  # a script that returns a DataFrame has imported it
    if pandas is None or not isinstance(result, pandas.DataFrame):
        raise TypeError(f"run() returned a {type(result).__name__}; return a list or a pandas DataFrame")
    if to_csv is None:
        return RunReturned(len(result))
    header = result.iloc[:0].to_csv(**to_csv) if to_csv.get("header") else ""
    return RunReturned(len(result), header, result.to_csv(**{**to_csv, "header": False}))


class ParentConnection:
    """The worker's end of the connection to its parent. If the connection is closed, the worker ends.

    As a context manager, it reports an `Exception` to the parent and in the log, and suppresses it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.inbox: queue.SimpleQueue[MiniBatch | None] = queue.SimpleQueue()
        """The mini-batches to run. None requests shutdown."""
        Thread(target=self._receive_all, daemon=True).start()

    def _receive_all(self) -> None:
        try:
            while True:
                self.inbox.put(self._connection.recv())
        except (EOFError, OSError):
            _end_process_group()

    def send(self, message: MessageFromWorker) -> None:
        try:
            self._connection.send(message)
        except OSError:
            _end_process_group()

    def __enter__(self) -> None:
        pass

    def __exit__(self, exc_type: object, error: BaseException | None, exc_traceback: object) -> bool:
        if not isinstance(error, Exception):  # exit() ends the process, as in Azure
            return False
        text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        self.send(ScriptFailed(text))
        return True


def _end_process_group() -> NoReturn:
    """Kill this process, with its process group if it leads its session."""
    if os.getsid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
