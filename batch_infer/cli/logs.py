"""The log on stderr, as text or as JSON lines, with all that would come there raw."""

from __future__ import annotations

import io
import logging
import sys
import threading
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from batch_infer.terminal import EscapingFormatter

FORMATS = ("text", "json")
log = logging.getLogger("batch_infer")
stop_log = logging.getLogger("batch_infer.stop")
"""Why a command stops early: told with -q too."""
_warnings_log = logging.getLogger("py.warnings")
_stderr_log = logging.getLogger("stderr")
_settled = {"format": "text"}


def set_log_format(found: str) -> None:
    """Keep the format of the log, which an error may need before the command has begun."""
    _settled["format"] = found


def is_json() -> bool:
    """Whether the log is JSON lines."""
    return _settled["format"] == "json"


def set_up_logging(*, quiet: bool = False, verbose: bool = False) -> None:
    """Send the package's log to stderr: warnings and more, with -v everything, with -q only errors.

    With it go Python's warnings, and where it is JSON also the traceback of a bug and what others write to stderr.
    """
    handler = StderrHandler(quiet=quiet)
    handler.setLevel(logging.DEBUG if verbose else logging.INFO)
    handler.setFormatter(_json_formatter() if is_json() else EscapingFormatter("batch-infer: %(message)s"))
    for logger in (log, _warnings_log, _stderr_log):
        logger.handlers = [handler]
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    logging.captureWarnings(True)
    if is_json():
        _take_stderr()


def log_error(sentence: object, code: int) -> None:
    """The sentence that a command ends with, whether or not it had set up its log before."""
    set_up_logging()
    log.error("%s", sentence, extra={"exit_code": code})


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    names = {"levelname": "level", "name": "logger", "exc_info": "exception"}
    return JsonFormatter(["levelname", "name", "message"], rename_fields=names, timestamp="time")


class StderrHandler(logging.Handler):
    """Log lines above the bar, where there is one."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__()
        self._quiet = quiet

    def filter(self, record: logging.LogRecord) -> Any:
        if self._quiet and record.levelno < logging.ERROR and record.name != stop_log.name:
            return False
        return super().filter(record)

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == _warnings_log.name:  # as Python writes them, with the line of code below
            record.msg, record.args = " ".join(record.getMessage().split()), ()
        try:
            tqdm.write(self.format(record), file=_beneath(sys.stderr))
        except OSError:  # full, or nobody reads it: no reason to end a run
            _write_no_more()


# What comes to stderr raw, where the log is JSON


def _take_stderr() -> None:
    """Have tracebacks, and whatever is written to stderr from here on, come as lines of the log."""
    if not isinstance(sys.stderr, _LoggedStream):
        sys.stderr = _LoggedStream(sys.stderr)
    sys.excepthook = _log_bug
    threading.excepthook = lambda met: _log_bug(met.exc_type, met.exc_value, met.exc_traceback)
    sys.unraisablehook = lambda met: _log_bug(met.exc_type, met.exc_value, met.exc_traceback)


def restore_stderr() -> None:
    """Log the line that was not ended, and let stderr be what it was."""
    if isinstance(sys.stderr, _LoggedStream):
        sys.stderr.write("\n")
        sys.stderr = sys.stderr.beneath


def _write_no_more() -> None:
    """Have stderr lead nowhere; Python would else try again at its end, and fail."""
    if isinstance(sys.stderr, _LoggedStream):
        sys.stderr.beneath = io.StringIO()
    else:
        sys.stderr = io.StringIO()


def _beneath(stream: TextIO) -> TextIO:
    return stream.beneath if isinstance(stream, _LoggedStream) else stream


def _log_bug(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    error = error or kind()
    log.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))


class _LoggedStream(io.StringIO):
    """Makes each line that is written to it a line of the log; of a bar, only as it was at last."""

    def __init__(self, beneath: TextIO) -> None:
        super().__init__()
        self.beneath = beneath
        self._line = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if told := line.rstrip().rpartition("\r")[2].strip():
                _stderr_log.warning("%s", told)
        return len(text)

    def fileno(self) -> int:
        return self.beneath.fileno()
