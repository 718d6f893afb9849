"""SIGINT and SIGTERM: the first asks a run to stop, a second SIGINT ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from batch_infer.cli.logs import stop_log


@contextmanager
def stop_on_signals(also: Callable[[], bool] = lambda: False) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether to stop; the signals have their old meaning again afterwards.

    `also` is asked where no signal has come: there may be another reason to stop.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop_log.warning("stopping; finished images are being committed (Ctrl-C again: at once)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked or also()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Have SIGTERM end a command as Ctrl-C does, where nothing has to be put in order first."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
