"""The ids that were given out, on disk: memory does not grow with the table."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any


class Ids:
    """Which ids are taken. Where no two rows can want the same one, as `distinct` says, nothing is kept."""

    def __init__(self, elsewhere: Callable[[str, str], bool] | None = None, *, distinct: bool) -> None:
        """`elsewhere` says of an id, and of the file that has it, whether a table has it that is read elsewhere."""
        self._distinct, self._elsewhere = distinct, elsewhere
        self._database = sqlite3.connect("")  # sqlite's own temporary file, removed by closing
        self._database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._execute = self._database.execute

    def add(self, name: str) -> bool:
        """Give an id out; False where it was given out before."""
        return self._distinct or self._execute("INSERT OR IGNORE INTO ids VALUES (?)", (name,)).rowcount == 1

    def are_elsewhere(self, name: str, file: str) -> bool:
        return self._elsewhere is not None and self._elsewhere(name, file)

    def own(self, name: str) -> str:
        """Give this id out, or, where a row above has taken it for its own, the next like it."""
        while not self.add(name):
            name += "+"
        return name

    def close(self) -> None:
        self._database.close()


def id_text(value: Any) -> str:
    """The id that a cell says."""
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers that once held an empty cell
        value = int(value)
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
