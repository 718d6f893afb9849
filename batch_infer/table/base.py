"""Define the classes and helpers that table formats share."""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""Width to which default ids pad the row number with zeros."""
BATCH_ROWS = 1024
MAX_COLUMNS = 1024
"""Maximum number of columns. Without it, JSON with values as keys ({"a red circle": 1}) would add a column per row."""
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""CSV separators, and how messages name them. Spreadsheets write semicolons in locales with a decimal comma."""
MAX_SHOWN_COLUMNS = 5
"""Maximum number of column names in a notice."""
BLANK_ROW = "rows without any value, which are skipped"
SHORT_ROW = "rows with fewer cells than there are columns, whose missing cells take their defaults"

READ_ERRORS = (OSError, pa.ArrowException, UnicodeError)

_SURROGATE = re.compile("[\ud800-\udfff]")
_NON_BYTE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Matches lone surrogates that do not represent a byte. JSON escapes may contain them."""
_PATH_ERRNOS = {
    getattr(errno, name)
    for name in ("ENOENT", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "ELOOP", "ENAMETOOLONG", "ENXIO", "EINVAL")
}
"""Error numbers that mean that a path is not a readable file. Others count as failures of the disk or network."""


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file to read. If `error` is set, it says why this file, folder or argument cannot be read.

    `path` is the local path, and `name` is shown to the user. Default row ids start with `stem`, usually the path
    relative to the argument, with `-` for `/` and without suffixes. `compression` is a suffix such as `.gz`, or ''.
    `is_named` is true if an argument is this file itself, not its folder or a glob. `url` may contain a secret and is
    never shown or stored.
    """

    path: Path
    name: str
    stem: str
    format: str = ""
    compression: str = ""
    origin: Literal["file", "url", "stdin", "memory"] = "file"
    error: str | None = None
    is_named: bool = True
    url: str = field(default="", repr=False)


def make_default_id(stem: str, row: int) -> str:
    """Return the id of a row without an id cell."""
    return f"{stem}-{row:0{ID_DIGITS}d}"


class Notice(NamedTuple):
    """A notice about a row. It is not an error. `kind` describes all such rows, and `detail` describes this one."""

    kind: str
    detail: str = ""


def make_short_row_notice(count: int, columns: Sequence[str]) -> Notice:
    """Return the notice about a row that has cells for the first `count` columns only."""
    missing = ", ".join(repr(name) for name in columns[count : count + MAX_SHOWN_COLUMNS])
    return Notice(SHORT_ROW, f"{count} of {len(columns)} cells, without {missing}")


class NoticeCounts:
    """Counts the notices of one pass over the tables by kind, and stores the first row of each kind."""

    def __init__(self) -> None:
        self._first_rows: dict[str, str] = {}
        self._counts = Counter[str]()

    def add(self, notice: Notice, source: object) -> None:
        """Count a notice about the row at `source`."""
        self._first_rows.setdefault(notice.kind, f"{source}: {notice.detail}" if notice.detail else str(source))
        self._counts[notice.kind] += 1

    def format_sentences(self) -> list[str]:
        """Return one sentence per kind."""
        return [f"{kind}: {self._counts[kind]:,} (first: {row})" for kind, row in self._first_rows.items()]


class RawRow(NamedTuple):
    """A row as read from its file. It is a tuple for speed, because a table may have millions of rows.

    `number` is the row number, from 0. `line` is the number of the row's first line, from 1, or None in formats
    that do not consist of lines. `error` says why the row cannot be read. `Tables` skips rows with a BLANK_ROW notice.
    """

    number: int
    cells: Mapping[str, Any]
    error: str | None = None
    line: int | None = None
    notice: Notice | None = None


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads a file whose columns are known.

    `renamed` maps each column or struct field that is renamed in `schema` to its name in the file. Each call of `read`
    yields all rows from the start. `read_column`, which only some formats have, yields the readable values of a column
    in batches and is faster than `read`.
    """

    file: TableFile
    schema: pa.Schema
    renamed: Mapping[str, str]
    read: Callable[[], Iterator[RawRow]]
    read_column: Callable[[str], Iterator[pa.Array]] | None = None

    def read_rows(self) -> Iterator[RawRow]:
        """Yield the rows in order. Unreadable rows have an error. If the file breaks off, an extra last row says so.

        Raises StorageError if the disk fails.
        """
        number = 0
        try:
            for row in self.read():
                yield row
                number = row.number + 1
        except READ_ERRORS as error:
            raise_storage_error(error, self.file.name, was_opened=True)
            yield RawRow(number, {}, f"the file breaks off here: {format_error(error)}")

    def read_arrays(self, name: str) -> Iterator[pa.Array]:
        """Yield the values of one column in batches, without unreadable rows."""
        if self.read_column is not None:
            yield from self.read_column(name)
            return
        dtype = self.schema.field(name).type
        values = (row.cells.get(name) for row in self.read_rows() if not row.error)
        while batch := list(islice(values, BATCH_ROWS)):
            yield to_array(batch, dtype)


def rename_duplicates(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return unique names, such as `tag_2` for the second `tag`, and a map from changed names to old names."""
    used, count = set(names), Counter[str]()
    distinct, renamed = [], {}
    for name in names:
        count[name] += 1
        new = name
        if count[name] > 1:
            while (new := f"{name}_{count[name]}") in used:
                count[name] += 1
            used.add(new)
            renamed[new] = name
        distinct.append(new)
    return distinct, renamed


class Scratch:
    """A temporary folder, created on first use, for downloaded, piped and decompressed tables."""

    def __init__(self) -> None:
        self._folder: TemporaryDirectory[str] | None = None
        self._count = 0

    def new_path(self) -> Path:
        """Return a new path in the folder. Raises StorageError if the folder cannot be created."""
        if self._folder is None:
            self._folder = temporary_folder()
        self._count += 1
        return Path(self._folder.name, f"{self._count:06d}")

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def raise_storage_error(error: Exception, name: str, *, was_opened: bool = False) -> None:
    """Raise StorageError for an OS error, such as EIO, that the path and content of the file do not explain.

    With `was_opened`, also raise it for most path errors, since a file that was opened before may have been removed.
    """
    if not isinstance(error, OSError) or error.errno in (None, errno.EINVAL):
        return
    if was_opened or error.errno not in _PATH_ERRNOS:
        raise StorageError(
            f"cannot read {name}: {format_error(error)}; run the same command again to continue"
        ) from error


def format_error(error: Exception) -> str:
    """Return the first line of an error message without the file name."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


# Bytes that are not UTF-8 are decoded to lone surrogates, so that only their own row becomes invalid.


def is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_encoding_error(text: str) -> str | None:
    """Return an error message if text cannot be encoded as UTF-8, else None."""
    if is_utf8(text):
        return None
    if _NON_BYTE_SURROGATE.search(text):
        return "contains a lone surrogate, which is half a character: write whole characters"
    return "is not UTF-8: save the table as UTF-8"


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates (usually bytes that were not UTF-8) with U+FFFD, so that results can store the text."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a surrogate that does not represent a byte
        return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
