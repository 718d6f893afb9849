"""Group the files of a mini-batch by folder, and decide which file owns an id that several files contain."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.errors import StorageError
from batch_infer.manifest import read_part
from batch_infer.records import ResultRow, Source, digest, utc_now
from batch_infer.store import path_exists, temporary_database
from batch_infer.table import is_ignored_name, make_default_id

_COLUMNS = ("id", "image_index", "source_file", "source_row", "generated_image")

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Names of a mini-batch's files in one folder, in order. `existing` contains the names of all files there."""

    path: Path
    files: tuple[str, ...]
    existing: frozenset[str]

    @property
    def sorted_files(self) -> list[str]:
        """The files in reading order. The first file by name owns an id that several files contain."""
        return sorted(self.files)

    def restore_order(self, results: pa.Table) -> pa.Table:
        """Return results in the order of the mini-batch's files."""
        positions = pc.index_in(results["source_file"], value_set=pa.array(self.files, pa.string()))
        return results.take(pc.sort_indices(positions))


def group_by_folder(files: Sequence[str]) -> tuple[list[FolderFiles], list[ResultRow]]:
    """Return the files by folder, and an invalid result for each file with the same name as an earlier one.

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
            refused.append(_refuse(file, other))
    folders = [FolderFiles(path, tuple(names), _list_existing(path, names)) for path, names in names_by_folder.items()]
    return folders, refused


def _list_existing(path: Path, names: Sequence[str]) -> frozenset[str]:
    """Return the names of a folder's files. A file that was removed no longer owns ids."""
    try:
        return frozenset(names).union(entry.name for entry in path.iterdir())
    except OSError:
        return frozenset(names)


def _refuse(file: Path, other: Path) -> ResultRow:
    name = f"{file.parent.name}/{file.name}"
    earlier_error = f"{file} and {other} have one name, by which their rows and images are known: rename one"
    return ResultRow(
        id=make_default_id(name, 0),  # default ids of tables contain no slash
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


@dataclass(frozen=True, slots=True)
class CommittedId:
    """A row that was committed under an id from its table, and the path of its image."""

    id: str
    image_index: int
    file: str
    row: int
    path: str | None


class IdOwnership:
    """A temporary database of all rows that were ever committed under an id from a table.

    If several files of a folder contain an id, the first file by name owns it. Two workers may both check before
    either commits, and both render the row. Therefore each worker checks again after its commit. Parts are never
    removed, so the worker that commits last sees both rows, and also settles the row of the other file. Both workers
    settle rows in the same way, so settling a row twice does no harm. If a worker dies before its second check, its
    mini-batch is retried, which begins with a check.
    """

    def __init__(self) -> None:
        self._database = temporary_database()
        self._database.execute(
            "CREATE TABLE ids (id TEXT, image_index INTEGER, file TEXT, row INTEGER, path TEXT,"
            " PRIMARY KEY (id, file, image_index)) WITHOUT ROWID"
        )
        self._database.execute("CREATE INDEX files ON ids (file)")
        self._part_names: set[str] = set()

    def add(self, parts: Iterable[Path]) -> None:
        """Read the parts that have not been read yet. Raises DamagedPartError, StorageError."""
        for part in parts:
            if part.name in self._part_names:
                continue
            try:
                columns = read_part(part, _COLUMNS).to_pydict()
            except StorageError:
                if path_exists(part):
                    raise
                continue  # another worker has set it aside
            rows = (row for row in zip(*(columns[name] for name in _COLUMNS), strict=True) if not _has_default_id(*row))
            self._database.executemany("INSERT OR REPLACE INTO ids VALUES (?,?,?,?,?)", rows)
            self._part_names.add(part.name)

    def has_earlier_owner(self, name: str, file: str, folder: FolderFiles) -> bool:
        """Return whether a file of the folder that sorts before `file` has a row under the id `name`."""
        rows = self._database.execute("SELECT DISTINCT file FROM ids WHERE id = ? AND file < ?", (name, file))
        return any(other in folder.existing for (other,) in rows)

    def find_conflicts(self, folder: FolderFiles) -> frozenset[CommittedId]:
        """Return all rows of existing files under an id that a file of the mini-batch and another file contain."""
        query = "SELECT DISTINCT a.id FROM ids AS a JOIN ids AS b ON b.id = a.id AND b.file <> a.file WHERE a.file = ?"
        names = {name for file in folder.files for (name,) in self._database.execute(query, (file,))}
        conflicts: list[CommittedId] = []
        for name in names:
            rows = self._database.execute("SELECT id, image_index, file, row, path FROM ids WHERE id = ?", (name,))
            committed = [entry for row in rows if (entry := CommittedId(*row)).file in folder.existing]
            if len({entry.file for entry in committed}) > 1:
                conflicts += committed
        return frozenset(conflicts)

    def close(self) -> None:
        self._database.close()


def _has_default_id(name: str, _: int, file: str, row: int, __: str | None) -> bool:
    """Return whether an id is the default id of its row. No other row can have it."""
    return name.rstrip("+") in (make_default_id(Source(file, row).stem, row), make_default_id(file.rstrip("+"), row))
