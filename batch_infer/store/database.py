"""A database for what would else grow in memory with the tables."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from typing import Any

from batch_infer.store.temporary import storage_fault

_STORAGE_FAULTS = ("full", "disk I/O error", "unable to open database file", "malformed", "not a database")


class _Cursor(sqlite3.Cursor):
    """A cursor that raises StorageError for faults of the disk, also where rows are read: SQLite reads as they come."""

    def execute(self, sql: str, parameters: Any = ()) -> _Cursor:
        try:
            super().execute(sql, parameters)
        except sqlite3.DatabaseError as error:
            raise _named(error) from error
        return self

    def executemany(self, sql: str, parameters: Iterable[Any]) -> _Cursor:
        try:
            super().executemany(sql, parameters)
        except sqlite3.DatabaseError as error:
            raise _named(error) from error
        return self

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except sqlite3.DatabaseError as error:
            raise _named(error) from error

    def fetchone(self) -> Any:
        try:
            return super().fetchone()
        except sqlite3.DatabaseError as error:
            raise _named(error) from error

    def fetchall(self) -> list[Any]:
        try:
            return super().fetchall()
        except sqlite3.DatabaseError as error:
            raise _named(error) from error


class _Database(sqlite3.Connection):
    """A connection whose statements raise StorageError where the temporary folder is full or broken."""

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        return self.cursor(_Cursor).execute(sql, parameters)

    def executemany(self, sql: str, parameters: Iterable[Any]) -> sqlite3.Cursor:
        return self.cursor(_Cursor).executemany(sql, parameters)


def _named(error: sqlite3.DatabaseError) -> Exception:
    if not any(fault in str(error) for fault in _STORAGE_FAULTS):
        return error
    return storage_fault("a temporary database", _folder(), error)


def _folder() -> str:
    """Return where SQLite keeps temporary files (https://www.sqlite.org/tempfiles.html, section 5)."""
    names = (os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp", "/tmp")
    return next((name for name in names if name and os.access(name, os.W_OK | os.X_OK)), os.curdir)


def temporary_database() -> sqlite3.Connection:
    """Open an empty database in a file of sqlite's own, which closing it removes; it is useless after a crash.

    Its statements raise StorageError where the temporary folder is full.
    """
    database = sqlite3.connect("", factory=_Database)
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA journal_mode = OFF")
    return database
