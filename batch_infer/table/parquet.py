"""Parquet, by pyarrow, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_infer.carried import to_result_array, to_values
from batch_infer.table.endings import TableFile
from batch_infer.table.names import distinct_fields, distinct_names
from batch_infer.table.raw import RawRow, broken
from batch_infer.table.scratch import Scratch
from batch_infer.table.streams import LONGEST, reason, refuse_storage_fault, unpack

BATCH = 1024
BATCH_BYTES = 32 << 20
WIDTH = 16
"""Bytes of a number or of a list element; a long list of equal ones takes only a few in the file."""
BUFFER = 1 << 20
"""Bytes of a column that are read at a time: without it pyarrow takes in a row group's whole column chunks."""

_WITH_LENGTH = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)

READ_ERRORS = (OSError, pa.ArrowException, UnicodeError)
FEW_ROWS = 1 << 20
"""Rows that a row group may have whatever its size: a million equal rows take only a few bytes."""


@dataclass(frozen=True, slots=True)
class Parquet:
    """A Parquet file; its cells are the plain values of `batch_infer.carried`.

    `schema` has distinct names; `renamed` has the file's own name of each that has another there, and `renamed_fields`
    that of each such field of a struct.
    """

    file: TableFile
    path: Path
    schema: pa.Schema
    renamed: Mapping[str, str]
    renamed_fields: Mapping[str, str]

    def rows(self) -> Iterator[RawRow]:
        """Yield a row for each that the footer counts: a row that a damaged row group does not give has its fault.

        Where the counts of the footer are damaged themselves, one row says so.
        """
        number = counted = 0
        try:
            with self._opened() as parquet:
                for group in range(parquet.num_row_groups):
                    for row in self._group(parquet, group, number):
                        yield row
                        number = row.number + 1
                    counted += max(0, parquet.metadata.row_group(group).num_rows)
                if counted < (total := parquet.metadata.num_rows):
                    fault = f"the footer is damaged: it counts {total} rows, and its row groups {counted}"
                    yield RawRow(number, {}, fault)
        except READ_ERRORS as error:
            yield broken(self.file, number, error)

    def arrays(self, name: str) -> Iterator[pa.Array]:
        """Yield one column in batches, without what cannot be read."""
        own = self.renamed.get(name, name)
        place = [each for each in self.schema.names if self.renamed.get(each, each) == own].index(name)
        with self._skipping_damage(), self._opened() as parquet:
            for group in range(parquet.num_row_groups):
                with self._skipping_damage():
                    for batch in parquet.iter_batches(batch_size=BATCH, row_groups=[group], columns=[own]):
                        yield batch.column(place)

    @contextmanager
    def _skipping_damage(self) -> Iterator[None]:
        """Ignore what cannot be read, unless the disk fails. Raises StorageError."""
        try:
            yield
        except READ_ERRORS as error:
            refuse_storage_fault(error, self.file.name, was_opened=True)

    def _opened(self) -> pq.ParquetFile:
        """The file, with its repeated texts as dictionaries: one long text may stand in millions of rows."""
        with pq.ParquetFile(self.path) as parquet:
            repeated = _repeated(parquet.metadata)
        return pq.ParquetFile(self.path, buffer_size=BUFFER, pre_buffer=False, read_dictionary=repeated)

    def _group(self, parquet: pq.ParquetFile, group: int, number: int) -> Iterator[RawRow]:
        fault = "it has fewer rows than the footer counts"
        first, count = number, parquet.metadata.row_group(group).num_rows
        try:
            size = _batch_size(parquet.metadata.row_group(group))
            for batch in parquet.iter_batches(batch_size=size, row_groups=[group]):
                yield from _batch(self._named(batch), number)
                number += len(batch)
        except READ_ERRORS as error:
            refuse_storage_fault(error, self.file.name, was_opened=True)
            fault = reason(error)
        else:
            if number - first >= count:
                return
        if 0 < count <= max(FEW_ROWS, 8 * self.path.stat().st_size):  # distinct rows take at least one bit each
            fault = f"rows {number} to {first + count - 1}, in row group {group}, cannot be read: {fault}"
            yield from (RawRow(missing, {}, fault) for missing in range(number, first + count))
        else:
            yield RawRow(number, {}, f"row group {group} is damaged: the footer counts {count} rows in it; {fault}")

    def _named(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """A batch with the names of the schema, in its structs too."""
        if not self.renamed_fields:
            return batch.rename_columns(self.schema.names)
        columns = [
            column.view(field.type) if pa.types.is_nested(field.type) else column
            for column, field in zip(batch.columns, self.schema, strict=True)
        ]
        return pa.RecordBatch.from_arrays(columns, self.schema.names)


def open_parquet(file: TableFile, scratch: Scratch) -> Parquet:
    """Raises OSError, pa.ArrowException and UnicodeError."""
    # Absolute: Arrow takes a relative path with a colon in it for a URI.
    path = unpack(file, scratch.place()) if file.packing else file.path.absolute()
    schema = pq.read_schema(path)
    names, renamed = distinct_names(schema.names)
    inner: dict[str, str] = {}
    fields = [
        field.with_name(name).with_type(distinct_fields(field.type, name, inner))
        for field, name in zip(schema, names, strict=True)
    ]
    return Parquet(file, path, pa.schema(fields), renamed, inner)


def _repeated(metadata: pq.FileMetaData) -> list[str]:
    """The columns of text or bytes that are stored as dictionaries in some row group."""
    columns = (group.column(k) for group in map(metadata.row_group, range(metadata.num_row_groups))
               for k in range(metadata.num_columns))  # fmt: skip
    found = {
        column.path_in_schema: None
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and any("DICTIONARY" in encoding for encoding in column.encodings)
    }
    return [name for name in found if "." not in name]


def _batch_size(group: pq.RowGroupMetaData) -> int:
    """How many of its rows are read together: as many as take BATCH_BYTES, of equal ones."""
    columns = map(group.column, range(group.num_columns))
    size = sum(max(column.total_uncompressed_size, WIDTH * column.num_values) for column in columns)
    return max(1, min(BATCH, BATCH_BYTES * int(group.num_rows) // max(1, int(size))))


def _batch(batch: pa.RecordBatch, number: int) -> Iterator[RawRow]:
    """Yield the rows of a batch. One that is too long is not converted to Python's values."""
    start = 0
    for place in _too_long(batch):
        yield from _short_rows(batch.slice(start, place - start), number + start)
        yield RawRow(number + place, {}, f"the row has more than {LONGEST} bytes")
        start = place + 1
    yield from _short_rows(batch.slice(start), number + start)


def _too_long(batch: pa.RecordBatch) -> list[int]:
    """The rows of a batch that have more than LONGEST bytes."""
    if batch.nbytes <= LONGEST:
        return []
    total = reduce(pc.add, map(_sizes, batch.columns))
    return list(pc.indices_nonzero(pc.greater(total, LONGEST)).to_pylist())


def _sizes(column: pa.Array) -> pa.Array:
    """Return the bytes of each cell, ignoring fixed-width numbers."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        sizes = _sizes(column.dictionary).take(column.indices)
    elif any(of(kind) for of in _WITH_LENGTH):
        sizes = pc.binary_length(column).cast(pa.int64())
    elif pa.types.is_primitive(kind):
        sizes = pa.nulls(len(column), pa.int64())
    else:
        cells = (column.slice(place, 1) for place in range(len(column)))
        sizes = pa.array([to_result_array(cell).nbytes for cell in cells], pa.int64())
    return sizes.fill_null(0)


def _short_rows(batch: pa.RecordBatch, number: int) -> Iterator[RawRow]:
    names = batch.schema.names
    try:
        columns = [to_values(column) for column in batch.columns]
    except ValueError:  # one text that is not UTF-8: it costs its own row
        yield from (_row(batch.slice(i, 1), number + i) for i in range(len(batch)))
    else:
        for i, cells in enumerate(zip(*columns, strict=True)):
            yield RawRow(number + i, dict(zip(names, cells, strict=True)))


def _row(batch: pa.RecordBatch, number: int) -> RawRow:
    """A batch of one row, read cell by cell."""
    cells, faults = {}, []
    for name in batch.schema.names:
        try:
            (cells[name],) = to_values(batch.column(name))
        except ValueError as error:
            faults.append(f"column {name!r} cannot be read: {reason(error)}")
    return RawRow(number, cells, "; ".join(faults) or None)
