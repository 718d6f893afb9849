r"""Escape control characters, for example as \x1b, in text for terminals and logs, and quote commands.

Ids, file names, prompts and server responses may contain characters that set a terminal's title, move its cursor or
reverse the text direction, and line breaks that would forge a log line.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
import shlex
from types import TracebackType
from typing import TypeAlias

_ExceptionInfo: TypeAlias = "tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]"

_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # text direction (https://www.unicode.org/reports/tr9/)
    "\u2028\u2029"  # line and paragraph separator
    "\ud800-\udfff]"  # lone surrogates: bytes of file names that are not valid UTF-8
)

_ERROR_HANDLER = "batch_infer_ascii"
_ASCII = {"·": "-"}
"""ASCII replacements for characters in reports."""


def escape_controls(text: object, keep: str = "") -> str:
    """Replace control characters with escapes, except those in `keep`."""
    return _CONTROLS.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), str(text))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class EscapingFormatter(logging.Formatter):
    """Formats each record as one line, followed by its traceback if it has one. The traceback keeps its line breaks."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape_controls(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: _ExceptionInfo) -> str:
        return escape_controls(super().formatException(ei), keep="\n\t")


def quote_command(*words: str) -> str:
    """Format a batch-infer command for a shell, in backquotes. Its words are quoted where needed."""
    return f"`{shlex.join(('batch-infer', *words))}`"


def never_fail_to_encode(stream: object) -> None:
    """Make a TextIOWrapper replace unsupported characters with ASCII instead of raising UnicodeEncodeError."""
    if isinstance(stream, io.TextIOWrapper):
        codecs.register_error(_ERROR_HANDLER, _as_ascii)
        stream.reconfigure(errors=_ERROR_HANDLER)


def _as_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_ASCII.get(character) or _escape(character) for character in characters), error.end
