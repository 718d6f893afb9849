"""Compare results.parquet with what merging the manifest would write."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_infer.carried import to_values
from batch_infer.errors import StorageError, first_line
from batch_infer.jobs.verify.image_records import Key
from batch_infer.jobs.verify.problems import Problems
from batch_infer.manifest import EARLIER_TYPES, cast_table
from batch_infer.records import RESULT_COLUMNS
from batch_infer.store import Store, insert_rows, temporary_database, temporary_file_errors, temporary_folder
from batch_infer.terminal import quote_command

RESULTS_PARQUET = "results.parquet"
BATCH = 2048
MAX_GROUP_ROWS = 16 * BATCH
"""Maximum number of rows of a row group that is read as a whole."""
MAX_CELL = 60
"""Maximum number of characters of a cell in a message."""

_ADDED = {column.name for column in RESULT_COLUMNS if "since" in column.metadata}
"""Result columns that results.parquet of an earlier version lacks."""

ReadExpected = Callable[[], Iterator[pa.Table]]
"""Returns the expected tables, each time from the first."""


def check_results(
    store: Store,
    schema: pa.Schema,
    read_expected: ReadExpected,
    problems: Problems,
    find_missing: Callable[[], object] = lambda: None,
    ignored: Collection[str] = (),
) -> bool:
    """Compare results.parquet with the expected tables of this schema, and add each row that differs to `problems`.

    Return whether the file was as expected. Equal files are compared as streams of Arrow tables. Only if they differ,
    call `find_missing`, which adds rows without a result to the problems, and look rows up by key. results.parquet may
    still have such rows. Cells of `ignored` columns may differ. Raises the errors of `read_expected`, StorageError.
    """
    try:
        with store.open_file(RESULTS_PARQUET) as stream, pq.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            schema = pa.schema([column for column in schema if column.name in names or column.name not in _ADDED])
            for name, earlier_type in EARLIER_TYPES.items():
                if name in names and file.schema_arrow.field(name).type == earlier_type:
                    schema = schema.set(schema.get_field_index(name), pa.field(name, earlier_type))
            columns = _round_trip(schema.empty_table()).schema
            if not file.schema_arrow.equals(columns):
                problems.add("results_differ", _describe_columns(file.schema_arrow, columns), path=RESULTS_PARQUET)
            elif _are_equal(file, schema, read_expected(), ignored):
                return True
            else:
                find_missing()
                with (
                    _limit_row_groups(file) as grouped,
                    closing(_ResultsComparison(grouped, problems, ignored)) as comparison,
                ):
                    comparison.find(_convert_to_stored(read_expected(), schema))
    except FileNotFoundError:
        detail = f"it is missing: write it with {quote_command('merge', store.location)}"
        problems.add("results_differ", detail, path=RESULTS_PARQUET)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"cannot read {store.locate(RESULTS_PARQUET)}: {error.strerror}") from error
        problems.add("results_differ", f"it cannot be read: {first_line(error)}", path=RESULTS_PARQUET)
    return False


def _round_trip(table: pa.Table) -> pa.Table:
    """Return a table as Parquet stores it, because some types, such as timestamps in seconds, change."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return pq.read_table(pa.BufferReader(sink.getvalue()))


def _convert_to_stored(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    selected = (cast_table(table.select(schema.names), schema) for table in tables)
    return selected if _round_trip(schema.empty_table()).schema.equals(schema) else map(_round_trip, selected)


def _describe_columns(actual: pa.Schema, expected: pa.Schema) -> str:
    lacking, added = ({*map(str, a)} - {*map(str, b)} for a, b in ((expected, actual), (actual, expected)))
    if not lacking | added:
        return "its columns are in another order"
    parts = [f"it lacks the columns {', '.join(sorted(lacking))}"] if lacking else []
    return " and ".join(parts + ([f"it has the unexpected columns {', '.join(sorted(added))}"] if added else []))


def _are_equal(file: pq.ParquetFile, schema: pa.Schema, expected: Iterator[pa.Table], ignored: Collection[str]) -> bool:
    batches = file.iter_batches(BATCH)
    rest = file.schema_arrow.empty_table()
    for table in _convert_to_stored(expected, schema):
        while len(rest) < len(table) and (batch := next(batches, None)) is not None:
            rest = pa.concat_tables([rest, pa.Table.from_batches([batch])])
        actual, rest = rest.slice(0, len(table)), rest.slice(len(table))
        if len(actual) < len(table) or any(_iterate_unequal_cells(table, actual, ignored)):
            return False
    return not len(rest) and next(batches, None) is None


def _iterate_unequal_cells(
    expected: pa.Table, actual: pa.Table, ignored: Collection[str]
) -> Iterator[tuple[int, str, Any, Any]]:
    """Yield the row number, column and both values of each cell that differs. NaN equals NaN."""
    for name, expected_column, actual_column in zip(
        expected.column_names, expected.columns, actual.columns, strict=True
    ):
        if name in ignored or expected_column.equals(actual_column):
            continue
        pairs = zip(to_values(expected_column), to_values(actual_column), strict=True)
        for row, (value, actual_value) in enumerate(pairs):
            if _replace_nan(value) != _replace_nan(actual_value):
                yield row, name, value, actual_value


def _replace_nan(value: Any) -> Any:
    """Replace NaN, which differs from itself, at any depth."""
    match value:
        case float():
            return value if value == value else "NaN"
        case list() | tuple():
            return [_replace_nan(inner) for inner in value]
        case dict():
            return {name: _replace_nan(inner) for name, inner in value.items()}
        case _:
            return value


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."


@contextmanager
def _limit_row_groups(file: pq.ParquetFile) -> Iterator[pq.ParquetFile]:
    """Yield the file, or a temporary copy with smaller row groups, because another program may have written it."""
    groups = range(file.metadata.num_row_groups)
    if all(file.metadata.row_group(group).num_rows <= MAX_GROUP_ROWS for group in groups):
        yield file
        return
    with temporary_folder() as folder:
        copy = Path(folder) / RESULTS_PARQUET
        with temporary_file_errors(reads=True), pq.ParquetWriter(copy, file.schema_arrow) as writer:
            for batch in file.iter_batches(BATCH):
                writer.write_batch(batch)
        with pq.ParquetFile(copy) as grouped:
            yield grouped


class _ResultsComparison:
    """Finds the rows in which a file differs from the expected tables."""

    def __init__(self, file: pq.ParquetFile, problems: Problems, ignored: Collection[str]) -> None:
        self._file, self._problems, self._ignored = file, problems, ignored
        self._starts = [0]
        for group in range(file.metadata.num_row_groups):
            self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)
        self._database = temporary_database()
        self._database.execute("CREATE TABLE actual (id, image_index, row)")
        start = 0
        for batch in file.iter_batches(BATCH, columns=["id", "image_index"]):
            keys = batch["id"].to_pylist(), batch["image_index"].to_pylist()
            insert_rows(self._database, "actual", [*keys, range(start, start + len(batch))])
            start += len(batch)
        self._database.execute("CREATE INDEX key ON actual (id, image_index, row)")
        self._database.execute("CREATE TABLE expected (id, image_index, PRIMARY KEY (id, image_index)) WITHOUT ROWID")

    def close(self) -> None:
        self._database.close()

    def find(self, expected: Iterator[pa.Table]) -> None:
        """Add missing, repeated, additional, different and misplaced rows to the problems."""
        last_row, is_ordered = -1, True
        for table in expected:
            keys: list[Key] = list(zip(table["id"].to_pylist(), table["image_index"].to_pylist(), strict=True))
            self._database.executemany("INSERT OR IGNORE INTO expected VALUES (?, ?)", keys)
            rows = [self._find_row(key) for key in keys]
            for key, row in zip(keys, rows, strict=True):
                if row is None:
                    self._problems.add(
                        "missing_row", f"{RESULTS_PARQUET} lacks this result", key=key, path=RESULTS_PARQUET
                    )
                else:
                    is_ordered, last_row = is_ordered and row > last_row, row
            present = [(position, row) for position, row in enumerate(rows) if row is not None]
            self._compare(table.take([position for position, _ in present]), [row for _, row in present])
        self._add_repeated()
        if not is_ordered:
            self._problems.add("results_differ", "its rows are not in the order of the tables", path=RESULTS_PARQUET)
        self._add_unexpected()

    def _find_row(self, key: Key) -> int | None:
        row = self._database.execute("SELECT min(row) FROM actual WHERE id = ? AND image_index = ?", key).fetchone()
        return None if row is None or row[0] is None else int(row[0])

    def _compare(self, expected: pa.Table, rows: Sequence[int]) -> None:
        """Compare a table with these rows of the file."""
        differences: dict[int, list[str]] = {}
        for row, name, value, actual in _iterate_unequal_cells(expected, self._read(rows), self._ignored):
            differences.setdefault(row, []).append(f"{name} is {_shorten(actual)} instead of {_shorten(value)}")
        for row, texts in sorted(differences.items()):
            key = expected["id"][row].as_py(), expected["image_index"][row].as_py()
            self._problems.add("results_differ", "; ".join(texts), key=key, path=RESULTS_PARQUET)

    def _read(self, rows: Sequence[int]) -> pa.Table:
        """Return these rows of the file in this order, reading one row group at a time."""
        by_group: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            by_group.setdefault(bisect_right(self._starts, row) - 1, []).append(position)
        pieces = [self._file.schema_arrow.empty_table()]
        for group, positions in by_group.items():
            table = self._file.read_row_group(group)
            pieces.append(table.take([rows[position] - self._starts[group] for position in positions]))
        order = pa.array(chain.from_iterable(by_group.values()), pa.int64())
        return pa.concat_tables(pieces).take(pc.sort_indices(order))

    def _add_repeated(self) -> None:
        select = (
            "SELECT id, image_index, count(*) FROM actual GROUP BY id, image_index HAVING count(*) > 1 ORDER BY 1, 2"
        )
        for name, index, count in self._database.execute(select):
            detail = f"{RESULTS_PARQUET} has this result {count} times"
            self._problems.add("duplicate_row", detail, key=(name, index), path=RESULTS_PARQUET)

    def _add_unexpected(self) -> None:
        """Add rows that the manifest lacks, except those that are reported as missing from it."""
        select = "SELECT DISTINCT id, image_index FROM actual EXCEPT SELECT id, image_index FROM expected"
        for key in self._database.execute(select):
            if not self._problems.is_missing(key):
                detail = "the manifest and the tables have no such result"
                self._problems.add("results_differ", detail, key=key, path=RESULTS_PARQUET)
