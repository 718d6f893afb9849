"""A worker's process: it imports the scoring script as Azure does, and runs the mini-batches that it is handed."""

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
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from batch_infer.simulation.messages import (
    Began,
    Duty,
    Failed,
    FromWorker,
    MiniBatch,
    Ready,
    Returned,
    ToWorker,
)

MODULE = "entry_script"
"""The script's name in this process: not its file's, which may be that of a module that it needs."""


@dataclass(frozen=True, slots=True)
class Context:
    """What run() is told beside the files, where it takes a second argument."""

    minibatch_index: int


class ScriptError(RuntimeError):
    """The script is not what a scoring script has to be, or returns what Azure does not take."""


def live(descriptor: int) -> None:
    """The life of the process. It ends when the other end of its link does, however that comes."""
    os.set_inheritable(descriptor, False)  # or what the script starts would keep the driver from seeing our end
    driver = Driver(Connection(descriptor))
    duty = driver.next()
    if not isinstance(duty, Duty):
        return
    script = None
    with driver.telling():
        script = Script(Path(duty.script))
    if script is None:
        sys.exit(1)
    driver.send(Ready())
    while isinstance(mini_batch := driver.next(), MiniBatch):
        driver.send(Began())
        with driver.telling():
            driver.send(to_rows(script.run(mini_batch), duty.to_csv))
    script.shut_down()


class Script:
    """The scoring script, ready to run. Raises what its import or its init() does, ScriptError."""

    def __init__(self, path: Path) -> None:
        self._module = _import(path)
        for name in ("init", "run"):
            if not callable(getattr(self._module, name, None)):
                raise ScriptError(f"{path} has no function {name}()")
        self._run: Callable[..., Any] = self._module.run
        self._takes_context = len(inspect.signature(self._run).parameters) > 1
        self._module.init()

    def run(self, mini_batch: MiniBatch) -> Any:
        files = list(mini_batch.files)
        return self._run(files, Context(mini_batch.index)) if self._takes_context else self._run(files)

    def shut_down(self) -> None:
        shutdown = getattr(self._module, "shutdown", None)
        if callable(shutdown):
            shutdown()


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise ScriptError(f"{path} is no Python file")
    if not path.with_name("__init__.py").exists():  # a package's modules would hide others of their names
        sys.path.insert(0, str(path.parent))  # the script may import its neighbours
    module = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_rows(result: Any, to_csv: Mapping[str, Any] | None) -> Returned:
    """How many rows were returned, and their text where that is kept. Raises ScriptError."""
    if isinstance(result, list):
        return Returned(len(result), text="" if to_csv is None else "".join(f"{item}\n" for item in result))
    pandas = sys.modules.get("pandas")  # a script that returns a frame has loaded it
    if pandas is None or not isinstance(result, pandas.DataFrame):
        raise ScriptError(f"run() returned a {type(result).__name__}; return a list or a pandas DataFrame")
    if to_csv is None:
        return Returned(len(result))
    head = result.iloc[:0].to_csv(**to_csv) if to_csv.get("header") else ""
    return Returned(len(result), head, result.to_csv(**{**to_csv, "header": False}))


class Driver:
    """The one who hands out mini-batches, as a worker sees it."""

    def __init__(self, link: Connection) -> None:
        self._link, self._sending = link, Lock()
        self._inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put(self._link.recv())
        except (EOFError, OSError):
            _end_all()

    def next(self) -> ToWorker:
        return self._inbox.get()

    def send(self, message: FromWorker) -> None:
        try:
            with self._sending:
                self._link.send(message)
        except OSError:
            _end_all()

    def telling(self) -> Telling:
        return Telling(self)


def _end_all() -> NoReturn:
    """End this process at once, and with it all that the script has started, as its driver would."""
    if os.getsid(0) == os.getpid():  # a session of its own
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


class Telling:
    """Ends the exception of what is done in here: the driver is told of it, and this worker's log."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):  # exit() ends the process, as it would there
            return False
        told = "".join(traceback.format_exception(error))
        print(told, file=sys.stderr, flush=True)
        self._driver.send(Failed(told))
        return True
