"""Merging: the manifest's parts as results.*, in input order."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.carried import common_type, estimate_bytes, make_result_names, result_type, to_array
from batch_infer.errors import StorageError
from batch_infer.jobs.results import write_results
from batch_infer.manifest import SCHEMA, CommittedImage, Manifest, ManifestIndex
from batch_infer.planning import Item, source_of
from batch_infer.records import Source
from batch_infer.settings import OutputSettings

BATCH = 2048
BATCH_BYTES = 64 << 20
BAD_SHOWN = 20
"""Failed and invalid results that are named; results.* name them all."""

_DESCRIBED = ["id", "image_index", "error", "source_file", "source_row"]

log = logging.getLogger("batch_infer")


class MissingResults(StorageError):
    """The manifest lists fewer results than were committed."""


@dataclass(slots=True)
class Counts:
    """What became of a table: its rows, and results (a row has one for each image) by status; `left` have none yet."""

    rows: int = 0
    images: int = 0
    ok: int = 0
    flagged: int = 0
    blocked: int = 0
    invalid: int = 0
    failed: int = 0
    left: int = 0
    bad_rows: int = 0
    """Rows, and not images, that failed or were invalid."""
    truncated: int = 0
    """Rows whose prompt is longer than the model reads."""
    bad_results: list[str] = field(default_factory=list, compare=False)
    """The first failed and invalid results: where each row is, its id and its error."""

    def counted(self, table: pa.Table, sources: Sequence[Source] = ()) -> pa.Table:
        """Add some results to the counts. `sources` has the place of each, where the tables say it."""
        statuses = table["status"].to_pylist()
        for status, number in Counter(statuses).items():
            setattr(self, status, getattr(self, status) + number)
        self.images += len(table) - table["generated_image"].null_count
        truncated = pc.and_(pc.equal(table["image_index"], 0), pc.fill_null(table["prompt_truncated"], False))
        self.truncated += pc.sum(truncated).as_py() or 0
        bad = (number for number, status in enumerate(statuses) if status in ("failed", "invalid"))
        for number in islice(bad, BAD_SHOWN - len(self.bad_results)):
            (row,) = table.select(_DESCRIBED).slice(number, 1).to_pylist()
            self.bad_results.append(_describe(row, sources[number : number + 1]))
        return table

    @property
    def results(self) -> int:
        return self.ok + self.flagged + self.blocked + self.invalid + self.failed


def _describe(row: Mapping[str, Any], sources: Sequence[Source]) -> str:
    source = sources[0] if sources else Source(row["source_file"], row["source_row"])
    image = f", image {row['image_index']}" if row["image_index"] else ""
    return f"{source} ({row['id']}{image}): {row['error']}"


def merge(
    items: Iterable[Item], index: ManifestIndex, carried: pa.Schema, out: Path, output: OutputSettings, least: int = 0
) -> Counts:
    """Write the results of these items, in their order, and count them.

    `least` results are known to be committed. Raises StorageError, and MissingResults where the index has fewer:
    results.* then stay as they were.
    """
    counts = Counts()
    tables = _complete(read_results(items, index, carried, counts), counts, least)
    write_results(tables, pa.schema([*SCHEMA, *carried]), out, output)
    return counts


def _complete(tables: Iterable[pa.Table], counts: Counts, least: int) -> Iterator[pa.Table]:
    """Raise MissingResults where these tables end before `least` results."""
    yield from tables
    if counts.results < least:
        raise MissingResults(
            f"the manifest lists {counts.results} results, and {least} were committed: its folder shows too few parts. "
            "results.* are as they were before; run the same command again"
        )


def merge_parts(manifest: Manifest, tables: Sequence[str], out: Path, output: OutputSettings, least: int = 0) -> Counts:
    """Write all results that the manifest holds, in the order of these tables, and count them. Raises as `merge` does.

    For an OUT whose tables are not at hand: rows that have left them since, or changed, cannot be told from others.
    """
    schema = results_schema(manifest.schemas())
    with manifest.index() as index:
        counts = Counts()
        counts.rows, counts.bad_rows = index.count_rows()
        found = index.in_order(tables)
        batches = iter(lambda: list(islice(found, BATCH)), [])
        results = (counts.counted(index.take(batch, schema)) for batch in batches)
        write_results(_complete(results, counts, least), schema, out, output)
    return counts


def results_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The result columns, and the carried ones of all parts, each of a type that holds what every part has in it.

    Parts of earlier versions have carried columns whose names differ from another's by case alone.
    """
    kinds: dict[str, set[pa.DataType]] = {}
    for schema in schemas:
        for column in schema:
            if column.name not in SCHEMA.names:
                kinds.setdefault(column.name, set()).add(result_type(column.type))
    types: dict[str, set[pa.DataType]] = {}
    for name, new in make_result_names(kinds, SCHEMA.names, known=True).items():
        types.setdefault(new, set()).update(kinds[name])
    fields = [(name, common_type(found)) for name, found in types.items()]
    for name, kind in fields:
        if pa.types.is_string(kind) and len(types[name] - {pa.null()}) > 1:
            names = " and ".join(sorted(map(str, types[name] - {pa.null()})))
            log.warning("column %r is %s in the manifest's parts: its values are carried as text", name, names)
    return pa.schema([*SCHEMA, *fields])


def read_results(items: Iterable[Item], index: ManifestIndex, carried: pa.Schema, counts: Counts) -> Iterator[pa.Table]:
    """What is committed of these items, in their order, in tables of a few thousand results; counts it too."""
    for batch in _batches(items):
        found = [(item, kept) for item in batch if (kept := _result_of(item, index)) is not None]
        counts.rows += len({item.id for item in batch})
        counts.bad_rows += len({item.id for item, kept in found if kept.status in ("failed", "invalid")})
        counts.left += len(batch) - len(found)
        if found:
            table = index.take([kept for _, kept in found])
            items_found = [item for item, _ in found]
            yield counts.counted(_as_now(items_found, table, carried), [item.source for item in items_found])


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in batches that part no row from its images."""
    batch: list[Item] = []
    size = 0
    for _, images in groupby(items, attrgetter("id")):
        batch.extend(images)
        size += estimate_bytes(batch[-1].carried.values())
        if len(batch) >= BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _result_of(item: Item, index: ManifestIndex) -> CommittedImage | None:
    """What is committed of an item as it stands in the table now; a result of what it was before does not count."""
    kept = index.find(item.key)
    return kept if kept is not None and kept.fingerprint == item.fingerprint else None


def _as_now(items: list[Item], table: pa.Table, carried: pa.Schema) -> pa.Table:
    """Results with the place and the carried columns that the table has now: neither changes an image."""
    places = [source_of(item) for item in items]
    table = table.set_column(
        table.column_names.index("source_file"), SCHEMA.field("source_file"), [[p[0] for p in places]]
    )
    table = table.set_column(
        table.column_names.index("source_row"), SCHEMA.field("source_row"), [[p[1] for p in places]]
    )
    for column in carried:
        table = table.append_column(column, to_array([item.carried.get(column.name) for item in items], column.type))
    return table
