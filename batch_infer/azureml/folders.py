"""Group the files of a mini-batch by folder, and decide which file owns an id that several files contain."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from batch_infer.manifest import read_part
from batch_infer.records import ResultRow, Source, digest, utc_now
from batch_infer.store import StoredFile, temporary_database, unless_removed
from batch_infer.table import is_ignored_name, make_default_id

log = logging.getLogger("batch_infer")


class FolderFiles(NamedTuple):
    """A folder with files of a mini-batch.

    `files`: their names in order; `existing`: these names and, if the folder can be listed, all other names in it. A
    file that no longer exists does not own ids.
    """

    path: Path
    files: tuple[str, ...]
    existing: frozenset[str]


def group_by_folder(files: Sequence[str]) -> tuple[list[FolderFiles], list[ResultRow]]:
    """Return the files by folder, and an invalid result for each file named like an earlier one in another folder.

    A row is identified by the name of its file without the folder, since a worker does not see other mini-batches.
    Hidden files, markers and documentation are left out, as in a folder of `batch-infer run`.
    """
    names_by_folder: dict[Path, list[str]] = {}
    first_by_name: dict[str, Path] = {}
    refused = []
    for file in dict.fromkeys(map(Path, files)):
        if is_ignored_name(file.name):
            log.info("%s is left out: its name is not that of a table", file)
        elif (other := first_by_name.setdefault(file.name, file)) == file:
            names_by_folder.setdefault(file.parent, []).append(file.name)
        else:
            refused.append(_make_invalid_row(file, other))
    folders = []
    for path, names in names_by_folder.items():
        existing = names
        with suppress(OSError):
            existing = [*names, *(entry.name for entry in path.iterdir())]
        folders.append(FolderFiles(path, tuple(names), frozenset(existing)))
    return folders, refused


def _make_invalid_row(file: Path, other: Path) -> ResultRow:
    """Return the result for a file with the name of another file."""
    name = f"{file.parent.name}/{file.name}"
    earlier_error = f"{file} and {other} have one name, by which their rows and images are known: rename one"
    return ResultRow(
        id=make_default_id(name, 0),  # unique, since the default id of a table's row contains no slash
        image_index=0,
        prompt=None,
        status="invalid",
        error=f"{file} and {other} have the same name, which identifies their rows and images: rename one",
        worker="table",
        finished_at=utc_now(),
        source_file=name,
        source_row=0,
        fingerprint=digest(["invalid", earlier_error]),  # earlier versions committed the digest of this text
    )


class CommittedId(NamedTuple):
    """The id, location and image path of a committed result."""

    id: str
    image_index: int
    source_file: str
    source_row: int
    generated_image: str | None

    @property
    def is_default(self) -> bool:
        """Whether the id is the default id of its row, perhaps with + appended. No other row can have that id."""
        file, row = self.source_file, self.source_row
        default_ids = make_default_id(Source(file, row).stem, row), make_default_id(file.rstrip("+"), row)
        return self.id.rstrip("+") in default_ids


class IdOwnership:
    """A temporary database of all rows that were ever committed under an id from a table.

    If several files of a folder contain an id, the first file by name owns it. Two workers with such files may check
    before either of them commits, and then each renders its row. Therefore each worker checks again after its commit.
    Only damaged parts are removed, so the worker that commits last sees both rows, and also settles that of the other
    file. Both workers settle rows in the same way, so settling a row twice does no harm. If a worker dies before its
    second check, its mini-batch is retried, and the retry begins with a check.
    """

    def __init__(self) -> None:
        self._database = temporary_database()
        self._database.execute(
            "CREATE TABLE ids (id TEXT, image_index INTEGER, source_file TEXT, source_row INTEGER,"
            " generated_image TEXT, PRIMARY KEY (id, source_file, image_index)) WITHOUT ROWID"
        )
        self._database.execute("CREATE INDEX files ON ids (source_file)")
        self._part_names: set[str] = set()

    def add(self, parts: Iterable[StoredFile]) -> None:
        """Read the parts that have not been read yet. Raises DamagedPartError, NewerPartError, StorageError."""
        for part in parts:
            if part.name not in self._part_names:
                with unless_removed(part):  # another worker may set it aside
                    columns = read_part(part, CommittedId._fields).to_pydict()
                    rows = map(CommittedId, *(columns[name] for name in CommittedId._fields))
                    values = (row for row in rows if not row.is_default)
                    self._database.executemany("INSERT OR REPLACE INTO ids VALUES (?,?,?,?,?)", values)
                    self._part_names.add(part.name)

    def has_earlier_owner(self, name: str, file: str, folder: FolderFiles) -> bool:
        """Return whether a file of the folder that sorts before `file` has a committed row with the id `name`."""
        query = "SELECT DISTINCT source_file FROM ids WHERE id = ? AND source_file < ?"
        return any(other in folder.existing for (other,) in self._database.execute(query, (name, file)))

    def find_conflicts(self, folder: FolderFiles) -> frozenset[CommittedId]:
        """Return the rows of existing files with ids that a file of the mini-batch shares with other existing files."""
        query = (
            "SELECT DISTINCT a.id FROM ids AS a JOIN ids AS b ON b.id = a.id AND b.source_file <> a.source_file"
            " WHERE a.source_file = ?"
        )
        names = {name for file in folder.files for (name,) in self._database.execute(query, (file,))}
        conflicts: list[CommittedId] = []
        for name in names:
            rows = map(CommittedId._make, self._database.execute("SELECT * FROM ids WHERE id = ?", (name,)))
            existing = [row for row in rows if row.source_file in folder.existing]
            if len({row.source_file for row in existing}) > 1:
                conflicts += existing
        return frozenset(conflicts)

    def close(self) -> None:
        self._database.close()
