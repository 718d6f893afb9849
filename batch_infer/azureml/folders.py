"""A mini-batch's files by their folders, and results of several folders as one table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.jobs import results_schema
from batch_infer.manifest import cast_table, to_table
from batch_infer.records import ResultRow, digest, utc_now
from batch_infer.table import is_ignored_name, make_default_id

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class Folder:
    """Files of one folder, in the order in which they came; `standing` are the names of all that it holds."""

    path: Path
    came: tuple[str, ...]
    standing: frozenset[str]

    @property
    def names(self) -> list[str]:
        """The order in which they are read: of two that have a row of one id, the first by name has it."""
        return sorted(self.came)

    def in_order(self, results: pa.Table) -> pa.Table:
        """Results of these files in the order in which the files came."""
        places = pc.index_in(results["source_file"], value_set=pa.array(self.came, pa.string()))
        return results.take(pc.sort_indices(places))


def by_folder(files: Sequence[str]) -> tuple[list[Folder], list[ResultRow]]:
    """The files by folder, and the results of those that cannot be told from another file of the mini-batch.

    A row is known by its file's name, and not by its folder's: a worker sees none of the other mini-batches, and
    cannot find one that has such a file. Hidden files, markers and documentation are left out, as of a folder of
    `batch-infer run`.
    """
    found: dict[Path, list[str]] = {}
    first: dict[str, Path] = {}
    refused = []
    for file in dict.fromkeys(map(Path, files)):
        if is_ignored_name(file.name):
            log.info("%s is left out: by its name it is no table", file)
        elif (twin := first.setdefault(file.name, file)) == file:
            found.setdefault(file.parent, []).append(file.name)
        else:
            refused.append(_refusal(file, twin))
    return [Folder(path, tuple(names), _standing(path, names)) for path, names in found.items()], refused


def _standing(path: Path, names: Sequence[str]) -> frozenset[str]:
    """A file that has gone since has left its ids."""
    try:
        return frozenset(names).union(inner.name for inner in path.iterdir())
    except OSError:
        return frozenset(names)


def _refusal(file: Path, twin: Path) -> ResultRow:
    name = f"{file.parent.name}/{file.name}"
    error = f"{file} and {twin} have one name, by which their rows and images are known: rename one"
    return ResultRow(
        id=make_default_id(name, 0),  # no default id of a table holds a slash
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


def joined(tables: Sequence[pa.Table], rows: Sequence[ResultRow]) -> pa.Table:
    """Results as one table, each carried column of a type that holds what every table has in it."""
    everything = [*tables, to_table(rows, pa.schema([]))]
    schema = results_schema(table.schema for table in everything)
    return pa.concat_tables([cast_table(table, schema) for table in everything])
