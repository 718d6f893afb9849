"""One end of a pipe to another process, as the one who hands out work sees it: a process that has died says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


def send(link: Connection, message: Any) -> None:
    """To a process that has died it goes nowhere: the link's other direction says so."""
    with suppress(OSError):
        link.send(message)


def received(link: Connection) -> Iterator[Any]:
    """What it has said since. Raises EOFError where it has died, or ended."""
    try:
        while link.poll():
            yield link.recv()
    except OSError as error:  # a connection that was reset
        raise EOFError from error
