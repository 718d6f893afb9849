"""Log to stderr as text or JSON lines. As JSON, tracebacks and what libraries write to sys.stderr are logged too."""

from __future__ import annotations

import io
import logging
import sys
import threading
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from batch_infer.terminal import EscapingFormatter

FORMATS = ("text", "json")
log = logging.getLogger("batch_infer")
stop_log = logging.getLogger("batch_infer.stop")
"""Logs why a command stops early, even with -q."""
_warnings_log = logging.getLogger("py.warnings")
_stderr_log = logging.getLogger("stderr")
_state = {"format": "text"}


def set_log_format(name: str) -> None:
    """Set the format of the log: `text` or `json`."""
    _state["format"] = name


def is_json() -> bool:
    """Return whether the log is JSON lines."""
    return _state["format"] == "json"


def set_up_logging(*, quiet: bool = False, verbose: bool = False) -> None:
    """Send the package's log and Python's warnings to stderr, from level INFO up, or from DEBUG if `verbose`.

    With `quiet`, log only errors and the reason for an early stop. If the log is JSON, tracebacks and what
    libraries write to sys.stderr become JSON lines too.
    """
    handler = StderrHandler(logging.DEBUG if verbose else logging.INFO)
    if quiet:
        handler.addFilter(lambda record: record.levelno >= logging.ERROR or record.name == stop_log.name)
    handler.setFormatter(_json_formatter() if is_json() else EscapingFormatter("batch-infer: %(message)s"))
    for logger in (log, _warnings_log, _stderr_log):
        logger.handlers = [handler]
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    logging.captureWarnings(True)
    if is_json():
        _capture_stderr()


def log_error(message: object, code: int) -> None:
    """Log the error that ends a command. Logging need not be set up yet."""
    set_up_logging()
    log.error("%s", message, extra={"exit_code": code})


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    names = {"levelname": "level", "name": "logger", "exc_info": "exception"}
    return JsonFormatter(["levelname", "name", "message"], rename_fields=names, timestamp="time")


class StderrHandler(logging.Handler):
    """Writes log lines to stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == _warnings_log.name:  # join the two lines in which Python formats a warning
            record.msg, record.args = " ".join(record.getMessage().split()), ()
        stream = sys.stderr.original if isinstance(sys.stderr, LoggedStream) else sys.stderr
        try:
            tqdm.write(self.format(record), file=stream)
        except OSError:  # a closed pipe or a full disk, which must not end a run
            # Discard all further output: at exit, Python would flush stderr again and fail.
            if isinstance(sys.stderr, LoggedStream):
                sys.stderr.original = io.StringIO()
            else:
                sys.stderr = io.StringIO()


def _capture_stderr() -> None:
    """Log tracebacks and each line written to sys.stderr."""
    if not isinstance(sys.stderr, LoggedStream):
        sys.stderr = LoggedStream(sys.stderr)
    sys.excepthook = _log_exception
    threading.excepthook = lambda args: _log_exception(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _log_exception(args.exc_type, args.exc_value, args.exc_traceback)


def restore_stderr() -> None:
    """Undo the capture of stderr, and log its last line if it is unfinished."""
    if isinstance(sys.stderr, LoggedStream):
        sys.stderr.write("\n")
        sys.stderr = sys.stderr.original


def _log_exception(exc_type: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    error = error or exc_type()
    log.critical("%s: %s", exc_type.__name__, error, exc_info=(exc_type, error, traceback))


class LoggedStream(io.StringIO):
    """A stream that logs nonempty lines. If a line is overwritten, as by a progress bar, it logs only the last text."""

    def __init__(self, original: TextIO) -> None:
        super().__init__()
        self.original = original
        self._line = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if message := line.rstrip().rpartition("\r")[2].strip():
                _stderr_log.warning("%s", message)
        return len(text)

    def fileno(self) -> int:
        return self.original.fileno()
