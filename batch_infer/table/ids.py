"""The ids that were given out, on disk: memory does not grow with the table."""

from __future__ import annotations

import sqlite3


class Ids:
    """Which ids are taken. Where no two rows can want the same one, as `distinct` says, nothing is kept."""

    def __init__(self, *, distinct: bool) -> None:
        self._distinct = distinct
        self._database = sqlite3.connect("")  # sqlite's own temporary file, removed by closing
        self._database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._execute = self._database.execute

    def add(self, name: str) -> bool:
        """Give an id out; False where it was given out before."""
        return self._distinct or self._execute("INSERT OR IGNORE INTO ids VALUES (?)", (name,)).rowcount == 1

    def own(self, name: str) -> str:
        """Give this id out, or, where a row above has taken it for its own, the next like it."""
        while not self.add(name):
            name += "+"
        return name

    def close(self) -> None:
        self._database.close()
