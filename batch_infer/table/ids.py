"""Assign unique row ids. A temporary file stores the ids in use, so that memory use does not grow with the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from batch_infer.errors import TableError
from batch_infer.store import temporary_database
from batch_infer.table.base import find_encoding_error, make_default_id
from batch_infer.table.columns import OpenTable
from batch_infer.table.fields import MAX_TEXT_LENGTH, format_id
from batch_infer.table.formats import get_stem, parse_name


class Ids:
    """Tracks the ids in use. With `distinct`, the caller ensures that no id repeats, and no id is stored."""

    def __init__(self, find_conflict: Callable[[str, str], str | None] | None = None, *, distinct: bool) -> None:
        """`find_conflict` takes an id and a file. It returns an error if another file may use the id, else None."""
        self._distinct, self._find_conflict = distinct, find_conflict
        self._has_collisions = False
        self._database = temporary_database()
        self._execute = self._database.execute
        # `similar` contains the ids that differ from one in `ids` only by case. A single table would be half as fast.
        self._execute("CREATE TABLE ids (folded TEXT PRIMARY KEY, id TEXT, scope TEXT) WITHOUT ROWID")
        self._execute(
            "CREATE TABLE similar (folded TEXT, id TEXT, scope TEXT, collides INTEGER, PRIMARY KEY (folded, id))"
            " WITHOUT ROWID"
        )
        self._execute("CREATE TABLE counts (name TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")

    def reserve(self, name: str, file: str) -> bool:
        """Reserve an id for a row of `file`. Return False if the id is in use."""
        if self._distinct:
            return True
        folded, scope = name.lower(), file if self._find_conflict else ""
        row = folded, None if folded == name else name, scope
        if self._execute("INSERT OR IGNORE INTO ids VALUES (?, ?, ?)", row).rowcount == 1:
            return True
        others = self._execute(
            "SELECT coalesce(id, folded), scope FROM ids WHERE folded = ?1"
            " UNION ALL SELECT id, scope FROM similar WHERE folded = ?1",
            (folded,),
        ).fetchall()
        if any(other == name for other, _ in others):
            return False
        collides = any(other == scope for _, other in others)
        self._execute("INSERT INTO similar VALUES (?, ?, ?, ?)", (folded, name, scope, collides))
        self._has_collisions |= collides
        return True

    def collides(self, name: str) -> bool:
        """Return whether an id differs from an earlier one only by case.

        In a shared folder, only ids of the same file count: which files are read together may change between runs, but
        the name of a row's image must not.
        """
        if not self._has_collisions:
            return False
        sql = "SELECT 1 FROM similar WHERE folded = ? AND id = ? AND collides"
        return self._execute(sql, (name.lower(), name)).fetchone() is not None

    def reserve_cell(self, value: Any, file: str) -> tuple[str | None, str | None]:
        """Reserve the id in an id cell. Return the id, or None and an error message."""
        name = format_id(value)
        if isinstance(value, (list, dict)):
            return None, f"the id must be text or a number, not a {type(value).__name__}"
        if len(name) > MAX_TEXT_LENGTH:
            return None, f"the id has {len(name)} characters; the maximum is {MAX_TEXT_LENGTH}"
        if "\0" in name:
            return None, "the id contains a NUL byte"
        if error := find_encoding_error(name):
            return None, f"the id {error}"
        if self._find_conflict and (conflict := self._find_conflict(name, file)):
            return None, conflict
        return (name, None) if self.reserve(name, file) else (None, f"duplicate id {name!r}")

    def reserve_unique(self, name: str, file: str) -> str:
        """Reserve and return an id, with + appended until it is unused."""
        while not self.reserve(name, file):
            name += "+"
        return name

    def reserve_numbered(self, name: str, file: str) -> str:
        """Reserve and return `name` with the number of its earlier occurrences, and with + if the id is in use."""
        self._execute("INSERT INTO counts VALUES (?, 0) ON CONFLICT (name) DO UPDATE SET number = number + 1", (name,))
        (number,) = self._execute("SELECT number FROM counts WHERE name = ?", (name,)).fetchone()
        return self.reserve_unique(f"{name}-{number}", file)

    def close(self) -> None:
        self._database.close()


def find_colliding_stems(stems: Iterable[str]) -> frozenset[str]:
    """Return the stems that differ from an earlier stem only by case."""
    first: dict[str, str] = {}
    return frozenset(stem for stem in stems if first.setdefault(stem.lower(), stem) != stem)


def assign_stems(names: Iterable[str]) -> dict[str, str]:
    """Return a unique stem for each file of a folder.

    If files share a stem, the first table by name gets it, or the first file if none is a table. The others get their
    full name, with + appended until it is unused.
    """
    ordered = sorted(names, key=lambda name: (parse_name(name) is None, name))
    owners: dict[str, str] = {}
    for name in ordered:
        owners.setdefault(get_stem(name), name)
    stems = {name: stem for stem, name in owners.items()}
    used = set(owners)
    for name in ordered:
        if name not in stems:
            stem = name
            while stem in used:
                stem += "+"
            used.add(stem)
            stems[name] = stem
    return stems


def reject_equal_ids(tables: list[OpenTable]) -> None:
    """Raise TableError if rows of two files would have the same default ids."""
    names: dict[str, list[str]] = {}
    for table in tables:
        names.setdefault(table.file.stem, []).append(table.file.name)
    for table in tables:
        same = names[table.file.stem]
        if len(same) < 2 or "id" in table.fields:
            continue
        default_id = make_default_id(table.file.stem, 0)
        message = f"{' and '.join(same)} would give their rows the same ids ({default_id}, ...): "
        if any(name.rpartition("#")[0] in same for name in same):
            raise TableError(
                f"{message}add an id column, use --id-from content, or save one under another name (#2 is a URL that "
                "differs only in parts that may be secret and are not shown)"
            )
        raise TableError(f"{message}rename one, name the folder that holds them, or add an id column")
