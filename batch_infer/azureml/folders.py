"""The files of a mini-batch grouped by folder, and the results of several folders as one table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.jobs import make_results_schema
from batch_infer.manifest import cast_table, to_table
from batch_infer.records import ResultRow, digest, utc_now
from batch_infer.table import is_ignored_name, make_default_id

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Files of one folder in the order of the mini-batch. `existing` has the names of all files in the folder."""

    path: Path
    files: tuple[str, ...]
    existing: frozenset[str]

    @property
    def names(self) -> list[str]:
        """The file names in reading order: the first file by name owns an id that several files have."""
        return sorted(self.files)

    def restore_order(self, results: pa.Table) -> pa.Table:
        """Return results in the order of the mini-batch's files."""
        positions = pc.index_in(results["source_file"], value_set=pa.array(self.files, pa.string()))
        return results.take(pc.sort_indices(positions))


def group_by_folder(files: Sequence[str]) -> tuple[list[FolderFiles], list[ResultRow]]:
    """Return the files by folder, and an invalid result for each file with the name of another one.

    Rows are identified by the name of their file without its folder, since a worker does not see the other
    mini-batches. Hidden files, markers and documentation are left out, as in a folder of `batch-infer run`.
    """
    names: dict[Path, list[str]] = {}
    first: dict[str, Path] = {}
    refused = []
    for file in dict.fromkeys(map(Path, files)):
        if is_ignored_name(file.name):
            log.info("%s is left out: its name is not that of a table", file)
        elif (other := first.setdefault(file.name, file)) == file:
            names.setdefault(file.parent, []).append(file.name)
        else:
            refused.append(_refuse(file, other))
    return [FolderFiles(path, tuple(each), _list_existing(path, each)) for path, each in names.items()], refused


def _list_existing(path: Path, names: Sequence[str]) -> frozenset[str]:
    """Return the names of a folder's files. A file that was removed owns no ids any more."""
    try:
        return frozenset(names).union(inner.name for inner in path.iterdir())
    except OSError:
        return frozenset(names)


def _refuse(file: Path, other: Path) -> ResultRow:
    name = f"{file.parent.name}/{file.name}"
    error = f"{file} and {other} have one name, by which their rows and images are known: rename one"
    return ResultRow(
        id=make_default_id(name, 0),  # default ids of tables contain no slash
        image_index=0,
        prompt=None,
        status="invalid",
        error=error,
        worker="table",
        finished_at=utc_now(),
        source_file=name,
        source_row=0,
        fingerprint=digest(["invalid", error]),
    )


def concatenate(tables: Sequence[pa.Table], rows: Sequence[ResultRow]) -> pa.Table:
    """Return results as one table, each carried column with a type that can hold the values of all tables."""
    everything = [*tables, to_table(rows, pa.schema([]))]
    schema = make_results_schema(table.schema for table in everything)
    return pa.concat_tables([cast_table(table, schema) for table in everything])
