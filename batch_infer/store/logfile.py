"""Log files in OUT: what the terminal shows, with times, and the traceback of the error that ended the command."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from batch_infer.store.paths import is_link, write_errors
from batch_infer.terminal import EscapingFormatter, escape_controls


@contextmanager
def open_log(path: Path) -> Iterator[TextIO]:
    """Open a log file to append to; it also gets the traceback of an exception that leaves the context.

    Raises StorageError where it cannot be opened. Later write errors are ignored, so that they never mask the original
    exception.
    """
    with write_errors(path):
        path.parent.mkdir(exist_ok=True)
        if is_link(path.parent):
            raise OSError(errno.ELOOP, "its folder is a link")
        file = os.fdopen(_open_without_links(path), "a", encoding="utf-8")
    try:
        yield file
    finally:
        if (error := sys.exc_info()[1]) is not None and not isinstance(error, SystemExit):
            with suppress(OSError):
                text = escape_controls("".join(traceback.format_exception(error)), keep="\n\t")
                os.write(file.fileno(), text.encode())
        with suppress(OSError):
            file.close()


def _open_without_links(path: Path) -> int:
    """Open a file to append to. Links are not followed; a pipe without a reader fails instead of blocking."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def log_handler(file: TextIO) -> logging.Handler:
    """Return a handler that writes to a file, with the time in UTC."""
    formatter = EscapingFormatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = LogfileHandler(file)
    handler.setFormatter(formatter)
    return handler


class LogfileHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic for type checkers alone
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore write errors: a full disk is reported by what stores results."""
