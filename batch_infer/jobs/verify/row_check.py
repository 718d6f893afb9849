"""Check that every row of a run's tables has a result, in the manifest and in results.parquet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from batch_infer.errors import ServiceError, UsageError
from batch_infer.jobs.checksums import ChecksumCheck
from batch_infer.jobs.job import open_tables
from batch_infer.jobs.merge import make_results_schema, read_all_results, read_results
from batch_infer.jobs.run_json import (
    count_scanned_results,
    parse_record,
    read_rules,
    refuse_unrepeatable_tables,
)
from batch_infer.jobs.summary import Counts
from batch_infer.jobs.verify.image_records import ImageRecords
from batch_infer.jobs.verify.problems import Problems
from batch_infer.jobs.verify.results_check import RESULTS_PARQUET, check_results
from batch_infer.manifest import SCHEMA, ManifestIndex, read_carried_fields
from batch_infer.planning import Item, make_finished_check
from batch_infer.records import PromptRequest
from batch_infer.settings import RunSettings
from batch_infer.sinks import make_sink
from batch_infer.store import Store, StoredFile
from batch_infer.table import RowRules, Tables

log = logging.getLogger("batch_infer")


class RowVerifier:
    """Compares rows with results. `parts` are the parts that can be read."""

    def __init__(
        self,
        store: Store,
        record: Mapping[str, Any],
        settings: RunSettings,
        parts: Sequence[StoredFile],
        images: ImageRecords,
        problems: Problems,
    ) -> None:
        self._store, self._record, self._settings, self._parts = store, record, settings, parts
        self._images, self._problems = images, problems

    def check(self, checksums: ChecksumCheck, tables: Tables | None, *, moved: bool) -> int | None:
        """Check that every row has a result and that results.parquet matches the manifest.

        Tables that were `moved` may have other paths than in results.parquet. Return the number of rows, or None if it
        is unknown.
        """
        summary = parse_record(self._record).summary
        is_complete = checksums.is_proof and summary is not None and not summary.remaining
        if summary is not None and is_complete and tables is not None and self._has_same(tables):
            return summary.rows
        before = self._problems.counts.copy()
        rows = None
        with ManifestIndex(self._parts) as index:
            if tables is not None and checksums.has_intact_results:
                rows = self._find_missing_rows(self._read_items(index, tables), index)
            elif tables is not None:
                rows = self._compare_with_tables(index, tables, ignored=("source_file",) if moved else ())
            else:
                self._compare_with_manifest(index, is_proven=checksums.is_proof or checksums.has_intact_results)
        reasons = [reason for path, reason in checksums.problems if path == RESULTS_PARQUET]
        if reasons and self._problems.counts == before:  # otherwise the rows that differ say more
            self._problems.add("results_differ", reasons[0], path=RESULTS_PARQUET)
        return rows

    def _has_same(self, tables: Tables) -> bool:
        return _are_unchanged(self._record, tables, read_rules(self._record, self._store.location))

    def _compare_with_tables(self, index: ManifestIndex, tables: Tables, ignored: Sequence[str]) -> int:
        """Check that each row of the tables has a result in the manifest and results.parquet. Return their number."""
        schema, counts, rows = pa.schema([*SCHEMA, *tables.carried]), Counts(), None

        def read_expected() -> Iterator[pa.Table]:
            nonlocal counts
            counts = Counts()
            return read_results(self._read_items(index, tables), index, tables.carried, counts)

        def find_missing() -> None:
            nonlocal rows
            rows = self._find_missing_rows(self._read_items(index, tables), index)

        is_equal = check_results(self._store, schema, read_expected, self._problems, find_missing, ignored)
        if is_equal and not counts.remaining:
            return counts.rows
        if rows is None:
            find_missing()
        return rows or 0

    def _read_items(self, index: ManifestIndex, tables: Tables) -> Iterator[Item]:
        return tables.read_rows(read_rules(self._record, self._store.location), make_finished_check(index))

    def _find_missing_rows(self, items: Iterator[Item], index: ManifestIndex) -> int:
        """Add each item that has no result with its fingerprint. Return the number of rows."""
        sink, rows, last_id = make_sink(self._store, self._settings.output.image_format), 0, None
        for item in items:
            rows += item.id != last_id
            last_id = item.id
            committed = index.find(item.key)
            if committed is not None and committed.fingerprint == item.fingerprint:
                continue
            reason = "no result is committed" if committed is None else "it changed after its result was committed"
            self._problems.add("missing_row", f"{item.source}: {reason}; `batch-infer run` renders it", key=item.key)
            self._images.add_missing(item.key, sink.possible_paths(item) if isinstance(item, PromptRequest) else ())
        return rows

    def _compare_with_manifest(self, index: ManifestIndex, *, is_proven: bool) -> None:
        """Compare results.parquet with all results in the manifest, and check only the number of results.

        The tables cannot be read. Results that the checksums prove may contain fewer, because they lack rows that left
        the tables.
        """
        files = self._record.get("tables", ())
        if not is_proven and (self._settings.table.tables or self._store.exists(RESULTS_PARQUET)):
            schema = make_results_schema(pa.schema(read_carried_fields(part)) for part in self._parts)
            check_results(self._store, schema, lambda: read_all_results(index, files, schema, Counts()), self._problems)
        total, committed = count_scanned_results(self._record), index.count_statuses().total()
        if committed < total:
            detail = f"{total - committed:,} of {total:,} results are not committed; `batch-infer run` renders them"
            self._problems.add("missing_row", detail)


def _are_unchanged(record: Mapping[str, Any], tables: Tables, rules: RowRules) -> bool:
    """Return whether the tables have the digest that the run recorded. False if either has none."""
    recorded = (record.get("survey") or {}).get("tables_digest")
    return recorded is not None and tables.compute_digest(rules) == recorded


@contextmanager
def open_recorded_tables(record: Mapping[str, Any], settings: RunSettings, *, moved: bool) -> Iterator[Tables | None]:
    """Yield the tables, or None with a warning if they cannot be read again.

    Raises UsageError or ServiceError if `moved` tables cannot be read.
    """
    if not settings.table.tables:  # an endpoint
        yield None
        return
    try:
        if not moved:
            refuse_unrepeatable_tables(record, settings.out)
        tables = open_tables(settings)
    except (UsageError, ServiceError) as error:
        if moved:
            raise
        _warn_about_tables(str(error))
        yield None
        return
    with tables:
        known = record.get("unreadable_tables", ())
        errors = [error for name, error in tables.unreadable_files.items() if name not in known]
        if errors:
            _warn_about_tables("; ".join(errors))
        yield None if errors else tables


def _warn_about_tables(reason: str) -> None:
    log.warning(
        "the tables of this run cannot be read, so only results.parquet and the number of results are checked (%s); "
        "name the tables after OUT if they were moved",
        reason,
    )
