"""A database for what would else grow in memory with the tables."""

from __future__ import annotations

import sqlite3


def temporary_database() -> sqlite3.Connection:
    """An empty one in a file of sqlite's own, which closing it removes; nobody will want it after a crash."""
    database = sqlite3.connect("")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA journal_mode = OFF")
    return database
