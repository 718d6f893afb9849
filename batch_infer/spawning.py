"""Start processes that do not import the main script, so that it needs no main guard."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import current_process
from threading import Lock

from batch_infer.errors import SettingsError

START_SECONDS = 1.0
"""Maximum number of seconds by which the start of a process delays a stop."""
_lock = Lock()
_ORIGINS = ("__file__", "__spec__")
"""Attributes of the main module by which multiprocessing tells a spawned process what to import as its main module."""


@contextmanager
def main_module_hidden() -> Iterator[None]:
    """Let processes that are spawned inside the context start without the main module of this process.

    A process would import it first. A script without `if __name__ == "__main__":` would then run again in each process,
    and one read from standard input cannot be found. No process of batch-infer needs anything from the main module.

    Raises SettingsError in a daemonic process, which cannot start others.
    """
    if current_process().daemon:
        raise SettingsError(
            "a daemonic process, such as a worker of multiprocessing.Pool, cannot start workers: render with "
            "num_processes=0, or call batch-infer in a concurrent.futures.ProcessPoolExecutor"
        )
    main = sys.modules["__main__"]
    with _lock:
        origins = {name: getattr(main, name) for name in _ORIGINS if hasattr(main, name)}
        try:
            main.__spec__ = None
            if "__file__" in origins:
                del main.__file__
            yield
        finally:
            for name, value in origins.items():
                setattr(main, name, value)
