"""Which files' rows have been committed under an id from a table, read from all parts of the manifest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from batch_infer.errors import StorageError
from batch_infer.manifest import read_part
from batch_infer.records import Source
from batch_infer.store import path_exists, temporary_database
from batch_infer.table import make_default_id

_COLUMNS = ("id", "image_index", "source_file", "source_row", "generated_image")


@dataclass(frozen=True, slots=True)
class IdClaim:
    """A row that was committed under an id from its table, and the path of its image."""

    id: str
    image_index: int
    file: str
    row: int
    path: str | None


class IdOwnership:
    """All id claims that were ever committed, in a temporary database.

    Where several files of a folder claim an id, the first file by name owns it. Two workers may both look before
    either commits, and both render. So each looks again after its commit: the one that commits last sees both claims,
    since parts are never removed, and also settles the row of the other file. What both do is the same, and may be
    done twice. If a worker dies in between, its mini-batch is retried, which begins with a look.
    """

    def __init__(self) -> None:
        self._database = temporary_database()
        self._database.execute(
            "CREATE TABLE claims (id TEXT, image_index INTEGER, file TEXT, row INTEGER, path TEXT,"
            " PRIMARY KEY (id, file, image_index)) WITHOUT ROWID"
        )
        self._database.execute("CREATE INDEX files ON claims (file)")
        self._parts: set[str] = set()

    def add(self, parts: Iterable[Path]) -> None:
        """Read those of these parts that have not been read yet. Raises DamagedPartError, StorageError."""
        for part in parts:
            if part.name in self._parts:
                continue
            try:
                columns = read_part(part, _COLUMNS).to_pydict()
            except StorageError:
                if path_exists(part):
                    raise
                continue  # another worker has set it aside
            rows = (row for row in zip(*(columns[name] for name in _COLUMNS), strict=True) if not _is_default(*row))
            self._database.executemany("INSERT OR REPLACE INTO claims VALUES (?,?,?,?,?)", rows)
            self._parts.add(part.name)

    def has_earlier_owner(self, name: str, file: str, existing: Collection[str]) -> bool:
        """Return whether an existing file that sorts before this one has claimed the id `name`."""
        rows = self._database.execute("SELECT DISTINCT file FROM claims WHERE id = ? AND file < ?", (name, file))
        return any(other in existing for (other,) in rows)

    def find_conflicts(self, files: Iterable[str], existing: Collection[str]) -> frozenset[IdClaim]:
        """Return all claims by existing files on ids that one of `files` and another file have claimed."""
        query = (
            "SELECT DISTINCT a.id FROM claims AS a JOIN claims AS b ON b.id = a.id AND b.file <> a.file"
            " WHERE a.file = ?"
        )
        ids = {name for file in files for (name,) in self._database.execute(query, (file,))}
        conflicts: list[IdClaim] = []
        for name in ids:
            rows = self._database.execute("SELECT id, image_index, file, row, path FROM claims WHERE id = ?", (name,))
            claims = [claim for row in rows if (claim := IdClaim(*row)).file in existing]
            if len({claim.file for claim in claims}) > 1:
                conflicts += claims
        return frozenset(conflicts)

    def close(self) -> None:
        self._database.close()


def _is_default(name: str, _: int, file: str, row: int, __: str | None) -> bool:
    """Return whether an id is the default id of its row, which no other row can have."""
    return name.rstrip("+") in (make_default_id(Source(file, row).stem, row), make_default_id(file.rstrip("+"), row))
