"""The ids that were given out, on disk: memory does not grow with the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from batch_infer.database import temporary_database
from batch_infer.table.endings import plain_stem, read_ending


class Ids:
    """Which ids are taken. Where no two rows can want the same one, as `distinct` says, nothing is kept."""

    def __init__(self, elsewhere: Callable[[str, str], str | None] | None = None, *, distinct: bool) -> None:
        """`elsewhere` says of an id, and of the file that has it, why it is a table's that is read elsewhere."""
        self._distinct, self._elsewhere = distinct, elsewhere
        self._database = temporary_database()
        self._database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("CREATE TABLE counts (name TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        self._execute = self._database.execute

    def add(self, name: str) -> bool:
        """Give an id out; False where it was given out before."""
        return self._distinct or self._execute("INSERT OR IGNORE INTO ids VALUES (?)", (name,)).rowcount == 1

    def elsewhere(self, name: str, file: str) -> str | None:
        """Why an id of this file's own cannot be given out; None where it can, for all that is known elsewhere."""
        return self._elsewhere(name, file) if self._elsewhere else None

    def own(self, name: str) -> str:
        """Give this id out, or, where a row above has taken it for its own, the next like it."""
        while not self.add(name):
            name += "+"
        return name

    def numbered(self, name: str) -> str:
        """Give out this name with the number of its occurrence, from 0."""
        self._execute("INSERT INTO counts VALUES (?, 0) ON CONFLICT (name) DO UPDATE SET number = number + 1", (name,))
        (number,) = self._execute("SELECT number FROM counts WHERE name = ?", (name,)).fetchone()
        return self.own(f"{name}-{number}")

    def close(self) -> None:
        self._database.close()


def id_text(value: Any) -> str:
    """The id that a cell says."""
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers that once held an empty cell
        value = int(value)
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def stems_among(names: Iterable[str]) -> dict[str, str]:
    """A stem of its own for each file of a folder."""
    stems: dict[str, str] = {}
    first: dict[str, str] = {}
    ordered = sorted(names, key=lambda name: (read_ending(name) is None, name))
    for name in ordered:
        stems[name] = plain_stem(name)
        first.setdefault(stems[name], name)
    taken = set(first)
    for name in (name for name in ordered if first[stems[name]] != name):
        stem = name
        while stem in taken:
            stem += "+"
        stems[name] = stem
        taken.add(stem)
    return stems
