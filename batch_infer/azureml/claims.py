"""Which files' rows have claimed an id of a table's own, told from the manifest, whoever's result counts there now."""

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
class Claim:
    """A row that was committed under an id that its table gave it."""

    id: str
    image_index: int
    file: str
    row: int
    path: str | None


class Claims:
    """All claims that were ever committed, in a temporary file.

    Of the files of a folder that claim one id the one whose name sorts first has it. Two workers may both look before
    either commits, and both render: so each looks once more after it has committed. Whoever has committed last then
    sees both claims, for parts do not go away; who was first may have looked too early, so the last one goes over the
    other file's row too. Whatever both do is the same, and does no harm twice. One who dies in between has its
    mini-batch tried again, which begins by looking.
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
        """Take in those of these parts that are not in yet. Raises DamagedPart, StorageError."""
        for part in parts:
            if part.name in self._parts:
                continue
            try:
                columns = read_part(part, _COLUMNS).to_pydict()
            except StorageError:
                if path_exists(part):
                    raise
                continue  # somebody has set it aside
            rows = (row for row in zip(*(columns[name] for name in _COLUMNS), strict=True) if not _is_default(*row))
            self._database.executemany("INSERT OR REPLACE INTO claims VALUES (?,?,?,?,?)", rows)
            self._parts.add(part.name)

    def has_before(self, name: str, file: str, standing: Collection[str]) -> bool:
        """Whether a file that stands there, and whose name sorts before this one's, has claimed an id."""
        found = self._database.execute("SELECT DISTINCT file FROM claims WHERE id = ? AND file < ?", (name, file))
        return any(other in standing for (other,) in found)

    def disputed(self, files: Iterable[str], standing: Collection[str]) -> frozenset[Claim]:
        """All claims by files that stand there on ids which one of these files has claimed, and another too."""
        ids = {
            name
            for file in files
            for (name,) in self._database.execute(
                "SELECT DISTINCT a.id FROM claims AS a JOIN claims AS b ON b.id = a.id AND b.file <> a.file"
                " WHERE a.file = ?",
                (file,),
            )
        }
        found: list[Claim] = []
        for name in ids:
            rows = self._database.execute("SELECT id, image_index, file, row, path FROM claims WHERE id = ?", (name,))
            claims = [claim for row in rows if (claim := Claim(*row)).file in standing]
            if len({claim.file for claim in claims}) > 1:
                found += claims
        return frozenset(found)

    def close(self) -> None:
        self._database.close()


def _is_default(name: str, _: int, file: str, row: int, __: str | None) -> bool:
    """Whether an id is what a row has that is given none: nobody else can have it."""
    return name.rstrip("+") in (make_default_id(Source(file, row).stem, row), make_default_id(file.rstrip("+"), row))
