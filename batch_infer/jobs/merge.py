"""Merge committed results into results.* in table order."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa

from batch_infer.carried import find_common_type, make_result_names, to_array, to_result_type
from batch_infer.errors import DamagedPartError, ServiceError, StorageError, UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.checksums import (
    add_root_digest,
    refuse_changed_parts,
    refuse_foreign_results,
    remove_root_digest,
    write_checksums,
)
from batch_infer.jobs.job import open_tables
from batch_infer.jobs.openai_results import find_partial_rows
from batch_infer.jobs.recovery import remove_leftovers
from batch_infer.jobs.results import write_results
from batch_infer.jobs.run_json import (
    ScanRecord,
    add_counts,
    count_scanned_results,
    ended_cleanly,
    parse_record,
    read_rules,
    read_settings,
    refuse_unrepeatable_tables,
    without_tables_digest,
)
from batch_infer.jobs.signing import check_sign_key
from batch_infer.jobs.summary import Counts
from batch_infer.manifest import SCHEMA, CommittedImage, Manifest, ManifestIndex, run_number
from batch_infer.planning import Item, get_source, make_finished_check, split_batches
from batch_infer.settings import OutputSettings, ResultsFormat, RunSettings
from batch_infer.store import Out, Store, open_store, to_absolute
from batch_infer.table import RowRules, Tables

BATCH = 2048
"""Maximum number of results to read and write together."""
BATCH_BYTES = 64 << 20
"""Size in bytes of the texts and carried cells at which a batch ends early."""

log = logging.getLogger("batch_infer")


class MissingResultsError(StorageError):
    """The manifest lists fewer results than were committed."""


def merge_results(
    out: Out, results: tuple[ResultsFormat, ...], *, base64: bool, sign_key: str | None = None
) -> tuple[Counts, tuple[ResultsFormat, ...]]:
    """Write results.* in these formats and those of the run. Return the counts and the formats.

    If OUT has a run.json, store the counts and the root digest in it. With `sign_key`, the path of a private key, sign
    the checksums. Raises LockedError, StorageError, ServiceError, and UsageError, for example if OUT contains nothing
    to merge, parts have disappeared or changed since the last merge, no format supports base64, or the key cannot be
    used.
    """
    check_sign_key(sign_key)
    unlocked_store = open_store(to_absolute(out))
    if not unlocked_store.exists(outdir.RUN_JSON) and not Manifest(unlocked_store).parts():
        raise UsageError(f"nothing to merge: {unlocked_store.location} has neither a run.json nor a manifest")
    with outdir.locked(unlocked_store) as store:
        if outdir.read_run(store) is None:
            refuse_foreign_results(store, results)
            return merge_parts(store, [], OutputSettings(results=results, base64=base64, sign_key=sign_key)), results
        record = outdir.read_existing_run(store)
        outdir.refuse_while_rescoring(store.location, record)
        refuse_changed_parts(store, record)
        settings = read_settings(record, store.location)
        formats = tuple(dict.fromkeys((*settings.output.results, *results)))  # or the others would become stale
        if "openai" not in settings.output.results:
            refuse_foreign_results(store, results)
        output = replace(settings.output, results=formats, base64=base64 or settings.output.base64, sign_key=sign_key)
        try:
            if not ended_cleanly(record) and settings.table.tables:
                remove_leftovers(store)  # but not for an endpoint, whose workers may be writing
            remove_root_digest(store, record)
            counts, are_recorded_tables = _merge_recorded(record, settings, store, output)
        except DamagedPartError as damage:
            if settings.table.tables:
                raise
            raise UsageError(
                f"{damage.part} is damaged ({damage.reason}): send its tables to the endpoint again with the same"
                " output folder, which renders their rows again, or move the part away to merge without it"
            ) from damage
        if not are_recorded_tables:
            record = without_tables_digest(record)
        outdir.write_run(store, add_root_digest(store, add_counts(record, counts)))
        return counts, formats


def _merge_recorded(
    record: Mapping[str, Any], settings: RunSettings, store: Store, output: OutputSettings
) -> tuple[Counts, bool]:
    """Merge in the order of the run's tables, or the whole manifest if there are no tables that can be read again.

    Also return whether the tables were read, and have the digest that the run recorded.
    """
    rules = read_rules(record, store.location)
    if not settings.table.tables:  # an endpoint
        return merge_parts(store, [], output), False
    try:
        refuse_unrepeatable_tables(record, store.location)
        tables = open_tables(settings)
    except (UsageError, ServiceError) as open_error:
        reason = str(open_error)
    else:
        with tables:
            already_unreadable = record.get("unreadable_tables", ())
            errors = [error for name, error in tables.unreadable_files.items() if name not in already_unreadable]
            if not errors:
                scan = parse_record(record).survey
                counts = merge_tables(tables, rules, scan, store, output)
                return counts, scan is not None and tables.compute_digest(rules) == scan.tables_digest
        reason = "; ".join(errors)
    log.warning("the tables of this run cannot be read, so all results in the manifest are merged (%s)", reason)
    counts = merge_parts(store, record.get("tables", ()), output)
    counts.remaining = max(0, count_scanned_results(record) - counts.results)
    return counts, False


def merge_tables(
    tables: Tables,
    rules: RowRules,
    scan: ScanRecord | None,
    store: Store,
    output: OutputSettings,
    min_results: int = 0,
) -> Counts:
    """Write and count the results of the rows of these tables, in their order, as `merge` does.

    `scan` is the last scan of tables in this OUT. Raises the errors of `merge`. If all runs read the same tables by the
    same rules, all results in the manifest belong to their rows, so the tables are not read again, which takes most of
    the time.
    """
    with Manifest(store).index() as index:
        if scan is not None and _has_only_results_of(tables, rules, scan, index):
            schema = pa.schema([*SCHEMA, *tables.carried])
            return _merge_index(index, tables.files, schema, store, output, min_results)
        items = tables.read_rows(rules, make_finished_check(index))
        return merge(items, index, tables.carried, store, output, min_results)


def _has_only_results_of(tables: Tables, rules: RowRules, scan: ScanRecord, index: ManifestIndex) -> bool:
    """Return whether the manifest contains only results of these tables, read by these rules.

    Also return False if results are missing, because only the tables have their rows, or if any result is failed or
    invalid, because only the tables have its line number.
    """
    if scan.tables_digest is None or any(run_number(part) < scan.tables_since for part in index.parts.values()):
        return False
    statuses = index.count_statuses()
    if statuses["failed"] or statuses["invalid"] or statuses.total() != scan.total:
        return False
    return tables.compute_digest(rules) == scan.tables_digest


def merge(
    items: Iterable[Item],
    index: ManifestIndex,
    carried: pa.Schema,
    store: Store,
    output: OutputSettings,
    min_results: int = 0,
) -> Counts:
    """Write and count the results of these items, in their order.

    Also write SHA256SUMS. Raises StorageError, DamagedPartError, the errors of reading `items`, and MissingResultsError
    if there are fewer than `min_results` results. In the last case, results.* stay unchanged.
    """
    counts, partial_rows = Counts(), set[str]()
    if "openai" in output.results:
        items = find_partial_rows(items, lambda item: _find_current(item, index) is not None, partial_rows)
    tables = _require_results(read_results(items, index, carried, counts), counts, min_results)
    digests = write_results(tables, pa.schema([*SCHEMA, *carried]), store, output, partial_rows)
    write_checksums(store, digests, output.sign_key)
    return counts


def _find_current(item: Item, index: ManifestIndex) -> CommittedImage | None:
    """Return the committed result of an item whose row has not changed since, or None."""
    committed = index.find(item.key)
    return committed if committed is not None and committed.fingerprint == item.fingerprint else None


def merge_parts(store: Store, tables: Sequence[str], output: OutputSettings, min_results: int = 0) -> Counts:
    """Write and count all results in the manifest, even of rows that were removed or changed since, as `merge` does.

    This is for a run whose tables cannot be read again or are unknown. Results of `tables` come first, in that order.
    Raises StorageError, DamagedPartError, NewerPartError and MissingResultsError, as `merge` does.
    """
    manifest = Manifest(store)
    schema = make_results_schema(manifest.schemas())
    with manifest.index() as index:
        return _merge_index(index, tables, schema, store, output, min_results)


def _merge_index(
    index: ManifestIndex,
    tables: Sequence[str],
    schema: pa.Schema,
    store: Store,
    output: OutputSettings,
    min_results: int,
) -> Counts:
    """Write and count all indexed results. Those of `tables` come first, in that order."""
    counts = Counts()
    counts.rows, counts.bad_rows = index.count_rows()
    results = _require_results(read_all_results(index, tables, schema, counts), counts, min_results)
    write_checksums(store, write_results(results, schema, store, output), output.sign_key)
    return counts


def read_all_results(
    index: ManifestIndex, tables: Sequence[str], schema: pa.Schema, counts: Counts
) -> Iterator[pa.Table]:
    """Yield all results of an index, those of `tables` first, in tables of at most BATCH rows. Add them to `counts`."""
    committed = index.iterate_in_table_order(tables)
    while batch := list(islice(committed, BATCH)):
        table = index.read_results(batch, schema)
        counts.add(table)
        yield table


def _require_results(tables: Iterable[pa.Table], counts: Counts, min_results: int) -> Iterator[pa.Table]:
    """Yield the tables, then raise MissingResultsError if they contained fewer than `min_results` results."""
    yield from tables
    if counts.results < min_results:
        raise MissingResultsError(
            f"the manifest lists {counts.results} results, but {min_results} were committed: its folder does not list "
            "all parts yet. results.* are unchanged; run the same command again"
        )


def make_results_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Return the result columns and the carried columns of all parts, with types that fit the values of all parts.

    If names of carried columns differ only in case, as in parts from earlier versions, all but the first are prefixed.
    """
    by_name: dict[str, set[pa.DataType]] = {}
    for schema in schemas:
        for column in schema:
            if column.name not in SCHEMA.names:
                by_name.setdefault(column.name, set()).add(to_result_type(column.type))
    by_result_name: dict[str, set[pa.DataType]] = {}
    for name, result_name in make_result_names(by_name, SCHEMA.names, reuse_prefixed=True).items():
        by_result_name.setdefault(result_name, set()).update(by_name[name])
    fields = [(name, find_common_type(types)) for name, types in by_result_name.items()]
    for name, field_type in fields:
        types = by_result_name[name] - {pa.null()}
        if pa.types.is_string(field_type) and len(types) > 1:
            type_names = " and ".join(sorted(map(str, types)))
            log.warning("column %r is %s in different parts: its values are carried as text", name, type_names)
    return pa.schema([*SCHEMA, *fields])


def read_results(items: Iterable[Item], index: ManifestIndex, carried: pa.Schema, counts: Counts) -> Iterator[pa.Table]:
    """Yield the committed results of these items in tables of at most BATCH rows, and add them to `counts`.

    Items without a result, and those whose rows changed after the commit, are skipped and count as remaining.
    """
    ids, bad_ids = set[str](), set[str]()
    for batch in split_batches(items, BATCH, BATCH_BYTES):
        matches = [(item, committed) for item in batch if (committed := _find_current(item, index)) is not None]
        previous_ids, ids = ids, {item.id for item in batch}
        # A row's images may be in several batches, so a bad row is remembered until its last batch.
        previous_bad_ids = bad_ids & ids
        bad_ids = previous_bad_ids.union(i.id for i, committed in matches if committed.status in ("failed", "invalid"))
        counts.rows += len(ids - previous_ids)
        counts.bad_rows += len(bad_ids - previous_bad_ids)
        counts.remaining += len(batch) - len(matches)
        if matches:
            table = _with_current_cells(matches, index, carried)
            counts.add(table, [item.source for item, _ in matches])
            yield table


def _with_current_cells(
    matches: Sequence[tuple[Item, CommittedImage]], index: ManifestIndex, carried: pa.Schema
) -> pa.Table:
    """Return results with each row's current file, row number and carried cells, which do not affect images."""
    table = index.read_results([committed for _, committed in matches])
    sources = [get_source(item) for item, _ in matches]
    for position, name in enumerate(("source_file", "source_row")):
        current = [source[position] for source in sources]
        table = table.set_column(table.column_names.index(name), SCHEMA.field(name), [current])
    for column in carried:
        values = [item.carried.get(column.name) for item, _ in matches]
        table = table.append_column(column, to_array(values, column.type))
    return table
