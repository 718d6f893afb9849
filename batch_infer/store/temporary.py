"""Create temporary files, folders and databases. Their errors name the temporary folder and say what to do."""

from __future__ import annotations

import errno
import io
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TextIO, TypeVar

from batch_infer.errors import StorageError

BUFFER_SIZE = 1 << 16
SQLITE_CACHE_KIB = 64 << 10
"""Memory in KiB that SQLite uses for its pages and for sorting keys."""
SQLITE_PAGE_BYTES = 1 << 15
"""Size of SQLite's pages. With its default of 4 KiB, inserting millions of rows takes nearly twice as long."""
SQLITE_SORTING_THREADS = 2
"""Number of threads that help SQLite sort the keys of an index."""
ROWS_PER_STATEMENT = 16
"""Number of rows that one statement inserts, which takes half as long as one statement per row."""
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors that only writing can raise."""
_DATABASE_ERRORS = ("full", "disk I/O error", "unable to open database file", "malformed", "not a database")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def temporary_file_errors(*, reads: bool = False) -> Iterator[None]:
    """Re-raise OSError as a StorageError that names the temporary folder and TMPDIR.

    With `reads`, the context also reads other files, so only errors that reading cannot raise are converted.
    """
    try:
        yield
    except OSError as error:
        if reads and error.errno not in _WRITE_ERRORS:
            raise
        try:
            folder = tempfile.gettempdir()
        except OSError:  # no folder is writable
            folder = os.environ.get("TMPDIR", os.sep + "tmp")
        raise _storage_error("file", folder, error.strerror or error) from error


def _storage_error(kind: str, folder: str, reason: object) -> StorageError:
    return StorageError(
        f"cannot write a temporary {kind} in {folder}: {reason}; free some space there, or set TMPDIR to a folder on a"
        " larger disk"
    )


class _Raw(io.FileIO):
    """Raises StorageError for write errors, even if closing a buffer around the file causes the write."""

    def write(self, data: object, /) -> int:
        with temporary_file_errors():
            return super().write(data)  # type: ignore[arg-type]


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Create a temporary folder. Raises StorageError."""
    with temporary_file_errors():
        return tempfile.TemporaryDirectory(prefix="batch-infer-", ignore_cleanup_errors=True)


def create_temporary(path: Path) -> BinaryIO:
    """Create a temporary file for writing. Creating, writing and closing may raise StorageError."""
    with temporary_file_errors():
        return io.BufferedWriter(_Raw(path, "w"), BUFFER_SIZE)


def open_temporary_text() -> TextIO:
    """Open an unnamed text file for writing, then reading. Opening, writing and closing may raise StorageError."""
    with temporary_file_errors(), tempfile.TemporaryFile(buffering=0) as file:
        raw = _Raw(os.dup(file.fileno()), "r+")
    return io.TextIOWrapper(io.BufferedRandom(raw, BUFFER_SIZE), encoding="utf-8", newline="")


def temporary_database() -> sqlite3.Connection:
    """Open an empty database in an unnamed file, which is deleted on close and may be damaged in a crash.

    Statements raise StorageError if the temporary folder is full or broken.
    """
    database = sqlite3.connect("", factory=_Database)
    for name, value in (
        ("page_size", SQLITE_PAGE_BYTES),
        ("cache_size", -SQLITE_CACHE_KIB),
        ("threads", SQLITE_SORTING_THREADS),
        ("synchronous", "OFF"),
        ("journal_mode", "OFF"),
    ):
        database.execute(f"PRAGMA {name} = {value}")
    return database


def insert_rows(database: sqlite3.Connection, table: str, columns: Sequence[Sequence[Any]]) -> None:
    """Insert the rows of these columns, which have equal lengths, into a table with these columns only."""
    rows = zip(*columns, strict=True)
    row = f"({', '.join('?' * len(columns))})"
    insert = f"INSERT INTO {table} VALUES {row}"
    cells = chain.from_iterable(islice(rows, len(columns[0]) // ROWS_PER_STATEMENT * ROWS_PER_STATEMENT))
    # Group the cells into one tuple per statement.
    statements = zip(*[cells] * (len(columns) * ROWS_PER_STATEMENT), strict=True)
    database.executemany(insert + f", {row}" * (ROWS_PER_STATEMENT - 1), statements)
    database.executemany(insert, rows)


def _raising_storage_error(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Wrap a cursor method to raise disk errors as StorageError."""

    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        try:
            return method(*arguments, **options)
        except sqlite3.DatabaseError as error:
            if not any(text in str(error) for text in _DATABASE_ERRORS):
                raise
            # SQLite uses the first of these folders that is writable: https://www.sqlite.org/tempfiles.html, section 5
            folders = (os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp", "/tmp")
            writable = (folder for folder in folders if folder and os.access(folder, os.W_OK | os.X_OK))
            raise _storage_error("database", next(writable, os.curdir), error) from error

    return call


class _Cursor(sqlite3.Cursor):
    """Raises StorageError for disk errors, including in fetches, because SQLite reads rows as they are fetched."""

    execute = _raising_storage_error(sqlite3.Cursor.execute)
    executemany = _raising_storage_error(sqlite3.Cursor.executemany)
    fetchone = _raising_storage_error(sqlite3.Cursor.fetchone)
    fetchmany = _raising_storage_error(sqlite3.Cursor.fetchmany)
    fetchall = _raising_storage_error(sqlite3.Cursor.fetchall)
    __next__ = _raising_storage_error(sqlite3.Cursor.__next__)  # type: ignore[arg-type]


class _Database(sqlite3.Connection):
    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        return self.cursor(_Cursor).execute(sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Any]) -> sqlite3.Cursor:
        return self.cursor(_Cursor).executemany(sql, parameters)
