"""Assign unique row ids, tracked on disk so that memory does not grow with the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from batch_infer.store import temporary_database
from batch_infer.table.base import encoding_error
from batch_infer.table.fields import MAX_TEXT_LENGTH, id_text
from batch_infer.table.formats import parse_name, stem_of


class Ids:
    """Tracks the ids in use. With `distinct`, no two rows can request the same id, and nothing is stored."""

    def __init__(self, conflict: Callable[[str, str], str | None] | None = None, *, distinct: bool) -> None:
        """`conflict` takes an id and its file, and returns an error message if another file owns the id, else None."""
        self._distinct, self._conflict = distinct, conflict
        self._has_collisions = False
        self._database = temporary_database()
        self._execute = self._database.execute
        self._execute("CREATE TABLE ids (folded TEXT PRIMARY KEY, id TEXT, scope TEXT) WITHOUT ROWID")
        self._execute(
            "CREATE TABLE alike (folded TEXT, id TEXT, scope TEXT, collides INTEGER, PRIMARY KEY (folded, id))"
            " WITHOUT ROWID"
        )
        self._execute("CREATE TABLE counts (name TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")

    def add(self, name: str, file: str) -> bool:
        """Reserve an id for a row of `file`. Return False if the id is in use."""
        if self._distinct:
            return True
        folded, scope = name.lower(), file if self._conflict else ""
        row = folded, None if folded == name else name, scope
        if self._execute("INSERT OR IGNORE INTO ids VALUES (?, ?, ?)", row).rowcount == 1:
            return True
        alike = self._execute(
            "SELECT coalesce(id, folded), scope FROM ids WHERE folded = ?1"
            " UNION ALL SELECT id, scope FROM alike WHERE folded = ?1",
            (folded,),
        ).fetchall()
        if any(other == name for other, _ in alike):
            return False
        collides = any(other == scope for _, other in alike)
        self._execute("INSERT INTO alike VALUES (?, ?, ?, ?)", (folded, name, scope, collides))
        self._has_collisions |= collides
        return True

    def collides(self, name: str) -> bool:
        """Return whether an id differs from an earlier one only by case.

        If other tables are read elsewhere, only ids of the same file count: the files that are read together may change
        between runs, but the name of a row's image must not.
        """
        if not self._has_collisions:
            return False
        sql = "SELECT 1 FROM alike WHERE folded = ? AND id = ? AND collides"
        return self._execute(sql, (name.lower(), name)).fetchone() is not None

    def add_own(self, value: Any, file: str) -> tuple[str | None, str | None]:
        """Reserve the id in a row's id cell. Return the id, or None and an error message."""
        name = id_text(value)
        if isinstance(value, (list, dict)):
            return None, f"the id is not text but {type(value).__name__}"
        if len(name) > MAX_TEXT_LENGTH:
            return None, f"the id has {len(name)} characters, and {MAX_TEXT_LENGTH} are the most"
        if "\0" in name:
            return None, "the id holds a NUL byte"
        if error := encoding_error(name):
            return None, f"the id {error}"
        if self._conflict and (conflict := self._conflict(name, file)):
            return None, conflict
        return (name, None) if self.add(name, file) else (None, f"duplicate id {name!r}")

    def add_free(self, name: str, file: str) -> str:
        """Reserve and return an id, with + appended until no earlier row uses it."""
        while not self.add(name, file):
            name += "+"
        return name

    def add_numbered(self, name: str, file: str) -> str:
        """Reserve and return `name` with the number of its occurrence, from 0."""
        self._execute("INSERT INTO counts VALUES (?, 0) ON CONFLICT (name) DO UPDATE SET number = number + 1", (name,))
        (number,) = self._execute("SELECT number FROM counts WHERE name = ?", (name,)).fetchone()
        return self.add_free(f"{name}-{number}", file)

    def close(self) -> None:
        self._database.close()


def find_colliding_stems(stems: Iterable[str]) -> frozenset[str]:
    """Return the stems that differ from an earlier one only by case."""
    first: dict[str, str] = {}
    return frozenset(stem for stem in stems if first.setdefault(stem.lower(), stem) != stem)


def assign_stems(names: Iterable[str]) -> dict[str, str]:
    """Return a unique stem for each file of a folder. Tables come first, then names in order."""
    ordered = sorted(names, key=lambda name: (parse_name(name) is None, name))
    owners: dict[str, str] = {}
    for name in ordered:
        owners.setdefault(stem_of(name), name)
    used = set(owners)
    stems = {}
    for name in ordered:
        stem = stem_of(name)
        if owners[stem] != name:
            stem = name
            while stem in used:
                stem += "+"
            used.add(stem)
        stems[name] = stem
    return stems
