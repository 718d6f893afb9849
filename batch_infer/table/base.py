"""What every format builds on: a file, its rows as they are read, remarks on them, and text that may not be UTF-8."""

from __future__ import annotations

import errno
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from batch_infer.carried import to_array
from batch_infer.errors import StorageError, first_line
from batch_infer.store import temporary_folder

ID_DIGITS = 8
"""Digits of the row number in a default id."""
BATCH_ROWS = 1024
SHOWN_COLUMNS = 5
"""Names of columns in one message."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_OF_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Surrogates that stand for no byte. They come from JSON escapes."""
_ERRNOS_OF_A_PATH = {
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "ELOOP", "ENAMETOOLONG", "ENXIO", "EINVAL")
}
"""The path is not a readable file. Any other errno is a failure of the disk or the network."""


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file to read, or an argument that means no readable file, with its error.

    `path` is what is read, `name` what the user called it, and `stem` starts the default ids of its rows: the path
    relative to the argument, without endings. `compression` is an ending such as `.gz`, or ''. `is_named` is true where
    the argument is this file, not a folder or glob that contains it. `url` may hold a secret: it is never shown or
    stored.
    """

    path: Path
    name: str
    stem: str
    format: str = ""
    compression: str = ""
    origin: Literal["file", "url", "stdin"] = "file"
    error: str | None = None
    is_named: bool = True
    url: str = field(default="", repr=False)

    def default_id(self, row: int) -> str:
        return make_default_id(self.stem, row)


def make_default_id(stem: str, row: int) -> str:
    """Return the id of a row without an id of its own."""
    return f"{stem}-{row:0{ID_DIGITS}d}"


class Remark(NamedTuple):
    """A remark on one row, which is no error. `detail` is what is particular to the row."""

    kind: Literal["blank", "short", "options"]
    detail: str = ""


_REMARKS = {
    "blank": "rows without any value, which are skipped",
    "short": "rows with fewer cells than there are columns, whose missing cells take their defaults",
    "options": "lines of .txt that look like comments or options and are rendered word for word "
    "(for parameters of a row use the columns of a .csv)",
}


def remark_short_row(count: int, columns: Sequence[str]) -> Remark:
    """Return the remark on a row with cells for the first `count` columns only."""
    missing = ", ".join(repr(name) for name in columns[count : count + SHOWN_COLUMNS])
    return Remark("short", f"{count} of {len(columns)} cells, without {missing}")


class RemarkCounts:
    """The remarks of one pass over the tables, counted by kind, with the first row of each."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._rows: dict[str, int] = {}

    def add(self, remark: Remark, source: object) -> None:
        """Count a remark on the row at `source`."""
        self._first.setdefault(remark.kind, f"{source}{remark.detail and ': '}{remark.detail}")
        self._rows[remark.kind] = self._rows.get(remark.kind, 0) + 1

    def sentences(self) -> list[str]:
        """Return one sentence for each kind."""
        return [f"{_REMARKS[kind]}: {self._rows[kind]:,} (first: {first})" for kind, first in self._first.items()]


class RawRow(NamedTuple):
    """A row as its file has it. `number` counts from 0; `error` says why the row cannot be read.

    `line` is the line of a text file, from 1. A row with the remark `blank` is skipped. A tuple, since a table has
    millions of them.
    """

    number: int
    cells: Mapping[str, Any]
    error: str | None = None
    line: int | None = None
    remark: Remark | None = None


@dataclass(frozen=True, slots=True)
class Reader(ABC):
    """An opened file. Its columns are known, and its rows can be read again and again.

    `renamed` has the file's own name of each column, or field of a struct, whose name in `schema` differs.
    """

    file: TableFile
    schema: pa.Schema
    renamed: Mapping[str, str]

    @abstractmethod
    def rows(self) -> Iterator[RawRow]:
        """Yield the rows in order. Unreadable rows have their errors; a file that breaks off ends with a row saying so.

        Raises StorageError where the disk fails.
        """

    def arrays(self, name: str) -> Iterator[pa.Array]:
        """Yield the values of one column in batches, without rows that cannot be read."""
        kind = self.schema.field(name).type
        values = (row.cells.get(name) for row in self.rows() if not row.error)
        while batch := list(islice(values, BATCH_ROWS)):
            yield to_array(batch, kind)


class Scratch:
    """The temporary folder for tables that are downloaded, piped in or decompressed. It is made on first use."""

    def __init__(self) -> None:
        self._folder: TemporaryDirectory[str] | None = None
        self._count = 0

    def new_path(self) -> Path:
        """Return a path for one more file. Raises StorageError."""
        if self._folder is None:
            self._folder = temporary_folder()
        self._count += 1
        return Path(self._folder.name, f"{self._count:06d}")

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def raise_storage_error(error: Exception, name: str, *, was_opened: bool = False) -> None:
    """Raise StorageError for a system error, such as EIO, that says nothing about the content of the file.

    With `was_opened`, also for errors on a file that was opened before, such as one that was removed since.
    """
    if not isinstance(error, OSError) or error.errno in (None, errno.EINVAL):
        return
    if was_opened or error.errno not in _ERRNOS_OF_A_PATH:
        raise StorageError(
            f"cannot read {name}: {error_text(error)}; run the same command again to continue"
        ) from error


def broken_off_row(file: TableFile, number: int, error: Exception) -> RawRow:
    """Return the last row of a file that breaks off. Raises StorageError where the disk fails."""
    raise_storage_error(error, file.name, was_opened=True)
    return RawRow(number, {}, f"the file breaks off here: {error_text(error)}")


def error_text(error: Exception) -> str:
    """Return the first line of an error, without the name of its file."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


# Bytes that are not UTF-8 are decoded to lone surrogates, so that they cost their own row alone.


def is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encoding_error(text: str) -> str | None:
    """Return what is wrong with text that cannot be UTF-8 and what to do, else None."""
    if is_utf8(text):
        return None
    if _SURROGATE_OF_NO_BYTE.search(text):
        return "holds a lone surrogate, which is half a character: write whole characters"
    return "is not UTF-8: save the table as UTF-8"


def clean(text: str) -> str:
    """Replace bytes that were not UTF-8 by U+FFFD, so that a results table can hold the text."""
    if is_utf8(text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
