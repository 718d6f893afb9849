"""Write log files in OUT: the messages of the terminal with times, and the traceback of a fatal error."""

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

from batch_infer.store.files import is_link, write_errors
from batch_infer.terminal import EscapingFormatter, escape_controls


@contextmanager
def open_log(path: Path) -> Iterator[TextIO]:
    """Open a log file for appending, and append the traceback of any exception but SystemExit that leaves it.

    Links are not followed, and a pipe without a reader fails instead of blocking. Raises StorageError if the file
    cannot be opened. Errors in writing the traceback and in closing are ignored, since they would mask the original
    exception.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with write_errors(path):
        path.parent.mkdir(exist_ok=True)
        if is_link(path.parent):
            raise OSError(errno.ELOOP, "its folder is a link")
        file = os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8")
    try:
        yield file
    finally:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, SystemExit):
            with suppress(OSError):
                text = escape_controls("".join(traceback.format_exception(error)), keep="\n\t")
                os.write(file.fileno(), text.encode())
        with suppress(OSError):
            file.close()


def log_handler(file: TextIO) -> logging.Handler:
    """Return a handler that writes records with UTC times to a file."""
    formatter = EscapingFormatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = LogfileHandler(file)
    handler.setFormatter(formatter)
    return handler


class LogfileHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic only for type checkers
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore errors in formatting and writing. A full disk is reported when results are stored."""
