"""Test the temporary database: disk errors name the temporary folder and say what to do."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import pytest

from batch_infer.errors import StorageError
from batch_infer.store import temporary_database


@pytest.mark.parametrize("together", [True, False])
def test_the_error_names_a_full_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    monkeypatch.delenv("SQLITE_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    database = temporary_database()
    database.execute("CREATE TABLE ids (id TEXT)")
    database.execute("PRAGMA max_page_count = 10")
    insert, rows = "INSERT INTO ids VALUES (?)", [("x" * 10_000,)] * 100
    sentence = f"cannot write a temporary database in {tmp_path}: database or disk is full; .* or set TMPDIR"
    with pytest.raises(StorageError, match=sentence):
        database.executemany(insert, rows) if together else [database.execute(insert, row) for row in rows]
    database.close()


def temporary_databases() -> set[Path]:
    """Return the unnamed files that SQLite has open in this process."""
    return {link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and "etilqs" in str(link.readlink())}


@pytest.mark.skipif(sys.platform != "linux", reason="finds the file in /proc")
@pytest.mark.parametrize("read", ["fetchone", "fetchall", "__next__"])
def test_damage_while_rows_are_read_is_a_storage_error(read: str) -> None:
    before = temporary_databases()
    database = temporary_database()
    database.execute("PRAGMA cache_size = 1")
    database.execute("CREATE TABLE ids (id TEXT)")
    database.executemany("INSERT INTO ids VALUES (?)", [("x" * 1000,)] * 5000)
    cursor = database.execute("SELECT id FROM ids")
    for file in temporary_databases() - before:
        with file.open("r+b") as stream:
            stream.write(b"\xff" * file.stat().st_size)
    with pytest.raises(StorageError, match="cannot write a temporary database in .*: database disk image is malformed"):
        while getattr(cursor, read)():
            pass
    database.close()


def test_other_database_errors_are_raised_unchanged() -> None:
    database = temporary_database()
    assert list(database.execute("SELECT ?", (1,))) == [(1,)]
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        database.execute("SELECT * FROM other")
    database.close()
