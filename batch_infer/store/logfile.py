"""Log files in OUT: what is told on a terminal, and more, for those who look later."""

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

from batch_infer.store.atomic import is_link, write_errors
from batch_infer.terminal import EscapingFormatter, escape_controls


@contextmanager
def open_log(path: Path) -> Iterator[TextIO]:
    """A log file to append to, which also keeps the traceback of what ends its time. Raises StorageError.

    That is raised where it cannot be opened. A disk that is full later costs lines, and nobody the error that he has.
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
    """Open a file that is no link to append to; a pipe without a reader fails instead of waiting for one."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def log_handler(file: TextIO) -> logging.Handler:
    """A handler that writes to a file, with the time in UTC."""
    formatter = EscapingFormatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = LogfileHandler(file)
    handler.setFormatter(formatter)
    return handler


class LogfileHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic for type checkers alone
    def handleError(self, record: logging.LogRecord) -> None:
        """A line that a full disk does not take is no news on the terminal: what comes of the disk will be."""
