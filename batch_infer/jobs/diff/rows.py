"""Pair the results of two manifests, and find the columns in which they differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.manifest import SCHEMA, CommittedImage, ManifestIndex, cast_table, read_part
from batch_infer.records import BOOKKEEPING
from batch_infer.store import StoredFile, prefetch

BATCH = 1024
"""Number of results at which a batch of whole parts ends."""
_KEY = ("id", "image_index")
_SOURCE = ("source_file", "source_row")
SOURCE_COLUMNS = (*_KEY, *_SOURCE, "status")
"""Result columns that are read of results in one run only."""
_IMAGE = ("generated_image", "sha256", "pixels_sha256", "image_bytes")
REQUEST_COLUMNS = tuple(
    name for name in SCHEMA.names if name not in {*_KEY, *_SOURCE, *_IMAGE, *BOOKKEEPING, "status", "fingerprint"}
)
"""The result columns that describe a request or a verdict. Two runs of the same work have the same values in them."""


@dataclass(frozen=True, slots=True)
class ResultPairs:
    """Results of A and B with the same ids and image indices, row by row, and those of A without a result in B."""

    a: pa.Table
    b: pa.Table
    only_a: pa.Table


def make_diff_schema(carried: Iterable[str] = ()) -> pa.Schema:
    """Return the columns to compare. `carried` columns, which decide an image, are compared as text."""
    names = (*SOURCE_COLUMNS, *_IMAGE, *REQUEST_COLUMNS)
    return pa.schema([*(SCHEMA.field(name) for name in names), *((name, pa.string()) for name in carried)])


def iterate_pairs(
    index_a: ManifestIndex, index_b: ManifestIndex, tables: Sequence[str], schema: pa.Schema
) -> Iterator[ResultPairs]:
    """Yield all results of A and those of B with the same keys, in batches of at least BATCH rows except the last.

    They are in the order of `order_parts`. Raises DamagedPartError, StorageError.
    """
    for table in _read_batches(index_a, tables, schema):
        matches = [index_b.find(key) for key in _get_keys(table)]
        committed = index_b.read_results([match for match in matches if match is not None], schema)
        if len(committed) == len(table):
            yield ResultPairs(table, committed, table.slice(0, 0))
        else:
            is_matched = pa.array([match is not None for match in matches], pa.bool_())
            yield ResultPairs(table.filter(is_matched), committed, table.filter(pc.invert(is_matched)))


def iterate_unmatched(
    index: ManifestIndex, other: ManifestIndex, tables: Sequence[str], limit: int
) -> Iterator[dict[str, Any]]:
    """Yield the first `limit` results of an index that the other one lacks. Raises DamagedPartError, StorageError."""
    if not limit:
        return
    schema = pa.schema([SCHEMA.field(name) for name in SOURCE_COLUMNS])
    for table in _read_batches(index, tables, schema):
        unmatched = pa.array([other.find(key) is None for key in _get_keys(table)], pa.bool_())
        for row in table.filter(unmatched).to_pylist():
            yield row
            limit -= 1
            if not limit:
                return


def find_unequal(pairs: ResultPairs) -> dict[str, np.ndarray]:
    """Return a boolean array (N,) for `status`, `bytes` and each request column: whether the pairs differ in it."""
    names = [name for name in pairs.a.column_names if name not in {*_KEY, *_SOURCE, *_IMAGE}]
    unequal = {name: _is_unequal(pairs.a[name], pairs.b[name]) for name in names}
    has_image_once = pc.xor(pairs.a["generated_image"].is_null(), pairs.b["generated_image"].is_null())
    unequal["bytes"] = _is_unequal(pairs.a["sha256"], pairs.b["sha256"]) | has_image_once.to_numpy()
    return unequal


def order_parts(parts: Iterable[StoredFile], tables: Sequence[str]) -> tuple[list[StoredFile], int]:
    """Return parts in the order of their first rows in the tables, and their total number of rows.

    Lookups in the other manifest are faster if consecutive rows are in few of its parts. Raises DamagedPartError,
    StorageError.
    """
    positions = {name: position for position, name in enumerate(tables)}
    keyed, row_count = [], 0
    for part in prefetch(parts):
        table = read_part(part, _SOURCE)
        row_count += len(table)
        if len(table):
            file = table["source_file"][0].as_py()
            first_row = pc.min(table["source_row"]).as_py()
            keyed.append((positions.get(file, len(positions)), file, first_row, part.name, part))
    return [part for *_, part in sorted(keyed, key=lambda entry: entry[:-1])], row_count


def _read_batches(index: ManifestIndex, tables: Sequence[str], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the current results of all parts in tables of at least BATCH rows, except the last."""
    parts, row_count = order_parts(index.parts.values(), tables)
    has_superseded = row_count != index.count_statuses().total()
    columns = schema.names if set(schema.names) <= set(SCHEMA.names) else None
    batch: list[pa.Table] = []
    for part in prefetch(parts):
        table = read_part(part, columns)
        if has_superseded:
            matches = map(index.find, _get_keys(table))
            table = table.filter(pa.array([_is_at(match, part, row) for row, match in enumerate(matches)], pa.bool_()))
        batch.append(cast_table(table, schema))
        if sum(map(len, batch)) >= BATCH:
            yield pa.concat_tables(batch)
            batch = []
    if batch:
        yield pa.concat_tables(batch)


def _is_at(image: CommittedImage | None, part: StoredFile, row: int) -> bool:
    return image is not None and (image.part, image.row) == (part.name, row)


def _get_keys(table: pa.Table) -> Iterator[tuple[str, int]]:
    return zip(table["id"].to_pylist(), table["image_index"].to_pylist(), strict=True)


def _is_unequal(first: pa.ChunkedArray, second: pa.ChunkedArray) -> np.ndarray:
    """Return which values differ. A null equals only a null."""
    if first.equals(second):
        return np.zeros(len(first), bool)
    if pa.types.is_list(first.type):  # Arrow cannot compare these; as texts, two NaN are equal
        pairs = zip(first.to_pylist(), second.to_pylist(), strict=True)
        return np.array([str(value) != str(other) for value, other in pairs], bool)
    differs = pc.fill_null(pc.not_equal(first, second), False)
    return np.asarray(pc.or_(differs, pc.xor(first.is_null(), second.is_null())).to_numpy())
