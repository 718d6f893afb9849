"""A mini-batch's files by their folders, and results of several folders as one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.manifest import SCHEMA, to_table
from batch_infer.records import ResultRow, digest, now
from batch_infer.table import common_type


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
    cannot find one that has such a file.
    """
    found: dict[Path, list[str]] = {}
    first: dict[str, Path] = {}
    refused = []
    for file in dict.fromkeys(map(Path, files)):
        if (twin := first.setdefault(file.name, file)) == file:
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
        id=f"{name}-{0:08d}",  # no default id of a table holds a slash
        image_index=0,
        prompt=None,
        status="invalid",
        error=error,
        worker="table",
        finished_at=now(),
        source_file=name,
        source_row=0,
        fingerprint=digest(["invalid", error]),
    )


def joined(tables: Sequence[pa.Table], rows: Sequence[ResultRow]) -> pa.Table:
    """Results as one table, each carried column of a type that holds what every table has in it."""
    everything = [*tables, to_table(rows, pa.schema([]))]
    types: dict[str, pa.DataType] = {}
    for table in everything:
        for field in list(table.schema)[len(SCHEMA) :]:
            types[field.name] = common_type(types.get(field.name, field.type), field.type)
    schema = pa.schema([*SCHEMA, *types.items()])
    return pa.concat_tables([_as(table, schema) for table in everything])


def _as(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
        elif (column := table[field.name]).type == field.type or not pa.types.is_string(field.type):
            columns.append(column.cast(field.type))
        else:
            columns.append(pa.array(map(_text, column.to_pylist()), pa.string()))
    return pa.table(columns, schema=schema)


def _text(value: Any) -> str | None:
    """Where columns of other types meet, lists and booleans are what they are in JSON."""
    if value is None:
        return None
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (bool, list, dict)) else str(value)
