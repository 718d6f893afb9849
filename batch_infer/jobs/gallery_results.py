"""Read the results that a gallery shows: those in results.parquet if it is up to date, otherwise the manifest's."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_infer.errors import DamagedPartError, StorageError, first_line
from batch_infer.galleries import Snapshot
from batch_infer.jobs import out as outdir
from batch_infer.jobs.merge import BATCH, make_results_schema
from batch_infer.jobs.run_json import RunRecord, parse_record
from batch_infer.manifest import Manifest, ManifestIndex, cast_table, read_carried_fields
from batch_infer.records import Status
from batch_infer.store import Store

RESULTS_PARQUET = "results.parquet"
TRIES = 5
"""How often to read the manifest while an active run combines parts."""

log = logging.getLogger("batch_infer")


class _Results(NamedTuple):
    """Selected results in tables of a schema, and the number of all results."""

    schema: pa.Schema
    tables: Iterator[pa.Table]
    total: int


def take_snapshot(store: Store, statuses: Collection[Status], limit: int) -> tuple[Snapshot, int]:
    """Return at most `limit` results, and the number of the others. With `statuses`, select only these.

    The results are in table order. An active run may remove parts in the meantime, because it has combined them. The
    results are then read again. Raises StorageError, and UsageError, for example if a part is damaged.
    """
    record = outdir.read_existing_run(store)
    if (snapshot := _copy_merged(store, parse_record(record), statuses, limit)) is not None:
        return snapshot
    for tries_left in reversed(range(TRIES)):
        parts = {part.name for part in Manifest(store).parts()}
        try:
            with Manifest(store).index(on_damage=_warn_about_damage) as index:
                return _copy(_read_manifest(index, record.get("tables", ()), statuses, limit))
        except StorageError:
            if not tries_left or parts <= {part.name for part in Manifest(store).parts()}:
                raise
    raise AssertionError("unreachable: the last try returns or raises")


def _copy(results: _Results) -> tuple[Snapshot, int]:
    with ExitStack() as undo:
        snapshot = undo.enter_context(Snapshot(results.schema))
        for table in results.tables:
            snapshot.add(table)
        undo.pop_all()
        return snapshot, results.total - snapshot.rows


def _warn_about_damage(error: DamagedPartError) -> None:
    log.warning("the gallery does not show the results in %s, which is damaged (%s)", error.part, error.reason)


def _copy_merged(
    store: Store, record: RunRecord, statuses: Collection[Status], limit: int
) -> tuple[Snapshot, int] | None:
    """Copy the results of results.parquet if it has all: the run has ended and merged them. Otherwise return None."""
    has_tables = bool(record.settings and record.settings.table.tables)  # workers of an endpoint may still commit
    if record.summary is None or record.rescoring or not has_tables:
        return None
    try:
        with store.open_file(RESULTS_PARQUET) as stream, pq.ParquetFile(stream) as file:
            if file.metadata.num_rows == record.summary.results:
                return _copy(_read_merged(file, statuses, limit))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # also from a damaged page in the middle
        log.debug("%s cannot be read, so the manifest is: %s", store.locate(RESULTS_PARQUET), first_line(error))
    return None


def _read_merged(file: pq.ParquetFile, statuses: Collection[Status], limit: int) -> _Results:
    schema = make_results_schema([file.schema_arrow])

    def read() -> Iterator[pa.Table]:
        left = limit
        for batch in file.iter_batches(BATCH, use_threads=False):
            table = cast_table(pa.Table.from_batches([batch]), schema)
            if statuses:
                table = table.filter(pc.is_in(table["status"], pa.array(list(statuses), pa.string())))
            yield table.slice(0, left)
            left -= min(left, len(table))
            if not left:
                return

    return _Results(schema, read(), file.metadata.num_rows)


def _read_manifest(index: ManifestIndex, tables: Sequence[str], statuses: Collection[Status], limit: int) -> _Results:
    schema = make_results_schema(pa.schema(read_carried_fields(part)) for part in index.parts.values())
    committed = index.iterate_in_table_order(tables)
    selected = islice((image for image in committed if not statuses or image.status in statuses), limit)

    def read() -> Iterator[pa.Table]:
        while batch := list(islice(selected, BATCH)):
            yield index.read_results(batch, schema)

    return _Results(schema, read(), index.count_statuses().total())
