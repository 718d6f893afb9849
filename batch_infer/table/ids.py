"""The ids that were given out, on disk: memory does not grow with the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from batch_infer.store import temporary_database
from batch_infer.table.endings import plain_stem, read_ending


class Ids:
    """Which ids are taken. Where no two rows can want the same one, as `distinct` says, nothing is kept."""

    def __init__(self, elsewhere: Callable[[str, str], str | None] | None = None, *, distinct: bool) -> None:
        """`elsewhere` says of an id, and of the file that has it, why it is a table's that is read elsewhere."""
        self._distinct, self._elsewhere = distinct, elsewhere
        self._database = temporary_database()
        self._database.execute("CREATE TABLE ids (folded TEXT PRIMARY KEY, id TEXT, scope TEXT) WITHOUT ROWID")
        self._database.execute(
            "CREATE TABLE alike (folded TEXT, id TEXT, scope TEXT, collides INTEGER, PRIMARY KEY (folded, id))"
            " WITHOUT ROWID"
        )
        self._any_collides = False
        self._database.execute("CREATE TABLE counts (name TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        self._execute = self._database.execute

    def add(self, name: str, file: str) -> bool:
        """Give an id to a row of this file; False where it was given out before."""
        if self._distinct:
            return True
        folded = name.lower()
        row = folded, None if folded == name else name, self._scope(file)
        if self._execute("INSERT OR IGNORE INTO ids VALUES (?, ?, ?)", row).rowcount == 1:
            return True
        return self._add_alike(name, folded, self._scope(file))

    def _add_alike(self, name: str, folded: str, scope: str) -> bool:
        """Give out an id that equals an earlier one but for case, if at all."""
        alike = self._execute(
            "SELECT coalesce(id, folded), scope FROM ids WHERE folded = ?1"
            " UNION ALL SELECT id, scope FROM alike WHERE folded = ?1",
            (folded,),
        ).fetchall()
        if any(other == name for other, _ in alike):
            return False
        collides = any(place == scope for _, place in alike)
        self._execute("INSERT INTO alike VALUES (?, ?, ?, ?)", (folded, name, scope, collides))
        self._any_collides |= collides
        return True

    def collides(self, name: str) -> bool:
        """Return whether an id that was given out differs from one given out before it by case alone.

        Beside tables that are read elsewhere, only ids of the same file count: which other files are read together
        with it changes from one time to the next, and the name of a row's image must not.
        """
        if not self._any_collides:
            return False
        sql = "SELECT 1 FROM alike WHERE folded = ? AND id = ? AND collides"
        return self._execute(sql, (name.lower(), name)).fetchone() is not None

    def _scope(self, file: str) -> str:
        return file if self._elsewhere else ""

    def elsewhere(self, name: str, file: str) -> str | None:
        """Why an id of this file's own cannot be given out; None where it can, for all that is known elsewhere."""
        return self._elsewhere(name, file) if self._elsewhere else None

    def own(self, name: str, file: str) -> str:
        """Give this id out, or, where a row above has taken it for its own, the next like it."""
        while not self.add(name, file):
            name += "+"
        return name

    def numbered(self, name: str, file: str) -> str:
        """Give out this name with the number of its occurrence, from 0."""
        self._execute("INSERT INTO counts VALUES (?, 0) ON CONFLICT (name) DO UPDATE SET number = number + 1", (name,))
        (number,) = self._execute("SELECT number FROM counts WHERE name = ?", (name,)).fetchone()
        return self.own(f"{name}-{number}", file)

    def close(self) -> None:
        self._database.close()


def id_text(value: Any) -> str:
    """The id that a cell says."""
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers that once held an empty cell
        value = int(value)
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def colliding_stems(stems: Iterable[str]) -> frozenset[str]:
    """Return the stems that differ from an earlier one by case alone."""
    first: dict[str, str] = {}
    return frozenset(stem for stem in stems if first.setdefault(stem.lower(), stem) != stem)


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
