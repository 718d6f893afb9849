"""A worker process: it imports the scoring script as Azure does, and runs the mini-batches that it receives."""

from __future__ import annotations

import importlib.util
import inspect
import os
import queue
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock, Thread
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any, NoReturn, TypeAlias

from batch_infer.simulation.mini_batches import MiniBatch

MODULE = "entry_script"
"""The script's module name. Its file name may be that of a module that the script imports."""


@dataclass(frozen=True, slots=True)
class ScriptTask:
    """The script to run, and the arguments of DataFrame.to_csv, None where rows are not written."""

    script: str
    to_csv: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class ScriptReady:
    """The script's init() has returned."""


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The script's run() is called."""


@dataclass(frozen=True, slots=True)
class RunReturned:
    """run() has returned this many rows: `text` for predictions.csv, `header` for its first line."""

    rows: int
    header: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class ScriptFailed:
    """init() or run() has raised, or returned an invalid result."""

    traceback: str


MessageFromWorker: TypeAlias = "ScriptReady | RunStarted | RunReturned | ScriptFailed"
MessageToWorker: TypeAlias = "ScriptTask | MiniBatch | None"
"""None: shut down."""


class ScriptError(RuntimeError):
    """The script lacks a function, or returned what Azure does not accept."""


def run_worker(descriptor: int) -> None:
    """Run the script until the parent closes the connection of this file descriptor or requests the shutdown."""
    os.set_inheritable(descriptor, False)  # otherwise processes of the script would keep the connection open
    parent = ParentConnection(Connection(descriptor))
    task = parent.receive()
    if not isinstance(task, ScriptTask):
        return
    script = None
    with parent:
        script = ScoringScript(Path(task.script))
    if script is None:
        sys.exit(1)
    parent.send(ScriptReady())
    while isinstance(mini_batch := parent.receive(), MiniBatch):
        parent.send(RunStarted())
        with parent:
            parent.send(format_rows(script.run(mini_batch), task.to_csv))
    script.shut_down()


class ScoringScript:
    """The imported script, after its init()."""

    def __init__(self, path: Path) -> None:
        """Raises ScriptError, and what the import or init() raises."""
        self._module = _import_script(path)
        for name in ("init", "run"):
            if not callable(getattr(self._module, name, None)):
                raise ScriptError(f"{path} has no function {name}()")
        self._run: Callable[..., Any] = self._module.run
        self._takes_context = len(inspect.signature(self._run).parameters) > 1
        self._module.init()

    def run(self, mini_batch: MiniBatch) -> Any:
        context = [SimpleNamespace(minibatch_index=mini_batch.index)] if self._takes_context else []
        return self._run(list(mini_batch.files), *context)

    def shut_down(self) -> None:
        shutdown = getattr(self._module, "shutdown", None)
        if callable(shutdown):
            shutdown()


def _import_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise ScriptError(f"{path} is not a Python file")
    if not path.with_name("__init__.py").exists():  # modules of a package could hide libraries of the same name
        sys.path.insert(0, str(path.parent))  # the script may import its neighbours
    module = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def format_rows(result: Any, to_csv: Mapping[str, Any] | None) -> RunReturned:
    """Count the rows of a result, and format them unless `to_csv` is None. Raises ScriptError."""
    if isinstance(result, list):
        return RunReturned(len(result), text="" if to_csv is None else "".join(f"{item}\n" for item in result))
    pandas = sys.modules.get("pandas")  # a script that returns a frame has imported it
    if pandas is None or not isinstance(result, pandas.DataFrame):
        raise ScriptError(f"run() returned a {type(result).__name__}; return a list or a pandas DataFrame")
    if to_csv is None:
        return RunReturned(len(result))
    header = result.iloc[:0].to_csv(**to_csv) if to_csv.get("header") else ""
    return RunReturned(len(result), header, result.to_csv(**{**to_csv, "header": False}))


class ParentConnection:
    """The worker's end of the connection to its parent, without which it ends.

    As a context manager it reports an exception to the parent and the log, and suppresses it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection, self._send_lock = connection, Lock()
        self._inbox: queue.SimpleQueue[MessageToWorker] = queue.SimpleQueue()
        Thread(target=self._receive_all, daemon=True).start()

    def _receive_all(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except (EOFError, OSError):
            _end_process_group()

    def receive(self) -> MessageToWorker:
        return self._inbox.get()

    def send(self, message: MessageFromWorker) -> None:
        try:
            with self._send_lock:
                self._connection.send(message)
        except OSError:
            _end_process_group()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):  # exit() ends the process, as it does in Azure
            return False
        text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        self.send(ScriptFailed(text))
        return True


def _end_process_group() -> NoReturn:
    """Kill this process and all processes that the script has started."""
    if os.getsid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
