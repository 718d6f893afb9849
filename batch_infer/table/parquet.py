"""Read Parquet with pyarrow in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from batch_infer.carried import convert_items, to_result_array, to_values
from batch_infer.table.base import (
    BATCH_ROWS,
    READ_ERRORS,
    RawRow,
    Reader,
    Scratch,
    TableFile,
    format_error,
    raise_storage_error,
    rename_duplicates,
)
from batch_infer.table.streams import MAX_ROW_SIZE, decompress

BATCH_BYTES = 32 << 20
MIN_VALUE_BYTES = 16
"""Minimum bytes to assume per value, since a long list of equal values takes only a few bytes in the file."""
BUFFER = 1 << 20
"""Bytes per read of a column. Without this limit, pyarrow reads all of a column in a row group at once."""
PLAUSIBLE_ROWS = 1 << 20
"""Number of rows that even a tiny row group can have, since a million equal rows take only a few bytes."""

_HAS_LENGTH = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)


def open_parquet(file: TableFile, prompt_column: str, scratch: Scratch) -> Reader:
    """Open a Parquet file. Raises OSError, pa.ArrowException, UnicodeError and StorageError."""
    # The path is absolute because Arrow parses a relative path with a colon as a URI.
    path = decompress(file, scratch.new_path()) if file.compression else file.path.absolute()
    schema = pq.read_schema(path)
    names, renamed = rename_duplicates(schema.names)
    renamed_fields: dict[str, str] = {}
    fields = [
        field.with_name(name).with_type(_rename_duplicate_fields(field.type, name, renamed_fields))
        for field, name in zip(schema, names, strict=True)
    ]
    rows = _ParquetRows(file.name, path, pa.schema(fields), renamed, bool(renamed_fields))
    return Reader(file, rows.schema, {**renamed, **renamed_fields}, rows.read, rows.read_column)


def _rename_duplicate_fields(dtype: pa.DataType, name: str, renamed: dict[str, str]) -> pa.DataType:
    """Return a type whose structs have unique field names, and add the changed names to `renamed`.

    `name` is the name of the column or the path of the field. Python, pandas and SQL engines cannot read a struct with
    duplicate field names.
    """
    if types.is_struct(dtype):
        names, duplicates = rename_duplicates([field.name for field in dtype])
        renamed.update({f"{name}.{new}": f"{name}.{old}" for new, old in duplicates.items()})
        return pa.struct(
            field.with_name(new).with_type(_rename_duplicate_fields(field.type, f"{name}.{new}", renamed))
            for field, new in zip(dtype, names, strict=True)
        )
    if types.is_map(dtype) or types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype):
        return convert_items(dtype, lambda item: _rename_duplicate_fields(item, name, renamed))
    return dtype


@dataclass(frozen=True, slots=True)
class _ParquetRows:
    """Reads the rows of a Parquet file. Cells are plain values, as defined in `batch_infer.carried`."""

    name: str
    path: Path
    schema: pa.Schema
    renamed: Mapping[str, str]
    has_renamed_fields: bool

    def read(self) -> Iterator[RawRow]:
        """Yield as many rows as the footer counts in each row group. Rows that cannot be read have an error.

        If a count in the footer is implausible, a single row with an error takes the place of the missing rows.
        """
        row_number = counted_rows = 0
        with self._open_file() as parquet:
            for group in range(parquet.num_row_groups):
                for row in self._read_group(parquet, group, row_number):
                    yield row
                    row_number = row.number + 1
                counted_rows += max(0, parquet.metadata.row_group(group).num_rows)
            if counted_rows < (total := parquet.metadata.num_rows):
                message = f"the footer is damaged: it counts {total} rows, and its row groups {counted_rows}"
                yield RawRow(row_number, {}, message)

    def read_column(self, name: str) -> Iterator[pa.Array]:
        original = self.renamed.get(name, name)
        duplicates = [column for column in self.schema.names if self.renamed.get(column, column) == original]
        with self._skip_damage(), self._open_file() as parquet:
            for group in range(parquet.num_row_groups):
                with self._skip_damage():
                    for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=[original]):
                        yield batch.column(duplicates.index(name))

    @contextmanager
    def _skip_damage(self) -> Iterator[None]:
        """Skip data that cannot be read. Raises StorageError if the disk fails."""
        try:
            yield
        except READ_ERRORS as error:
            raise_storage_error(error, self.name, was_opened=True)

    def _open_file(self) -> pq.ParquetFile:
        """Open the file. Read repeated texts as dictionaries, since one long text may be in millions of rows."""
        with pq.ParquetFile(self.path) as parquet:
            repeated = _find_repeated(parquet.metadata)
        return pq.ParquetFile(self.path, buffer_size=BUFFER, pre_buffer=False, read_dictionary=repeated)

    def _read_group(self, parquet: pq.ParquetFile, group: int, first: int) -> Iterator[RawRow]:
        metadata = parquet.metadata.row_group(group)
        row_number, count = first, metadata.num_rows
        message = "it has fewer rows than the footer counts"
        try:
            for batch in parquet.iter_batches(batch_size=_choose_batch_size(metadata), row_groups=[group]):
                yield from _read_batch(self._rename(batch), row_number)
                row_number += len(batch)
        except READ_ERRORS as error:
            raise_storage_error(error, self.name, was_opened=True)
            message = format_error(error)
        else:
            if row_number - first >= count:
                return
        if 0 < count <= max(PLAUSIBLE_ROWS, 8 * self.path.stat().st_size):  # distinct rows take at least one bit each
            message = f"rows {row_number} to {first + count - 1}, in row group {group}, cannot be read: {message}"
            yield from (RawRow(missing, {}, message) for missing in range(row_number, first + count))
        else:
            message = f"row group {group} is damaged: the footer counts {count} rows in it; {message}"
            yield RawRow(row_number, {}, message)

    def _rename(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return a batch with the schema's names for columns and struct fields."""
        if not self.has_renamed_fields:
            return batch.rename_columns(self.schema.names)
        columns = [
            column.view(field.type) if types.is_nested(field.type) else column
            for column, field in zip(batch.columns, self.schema, strict=True)
        ]
        return pa.RecordBatch.from_arrays(columns, self.schema.names)


def _find_repeated(metadata: pq.FileMetaData) -> list[str]:
    """Return the text and bytes columns, without a dot in their path, that any row group stores as a dictionary."""
    repeated = set()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(metadata.num_columns)):
            is_dictionary = any("DICTIONARY" in encoding for encoding in column.encodings)
            if column.physical_type == "BYTE_ARRAY" and is_dictionary and "." not in column.path_in_schema:
                repeated.add(column.path_in_schema)
    return list(repeated)


def _choose_batch_size(group: pq.RowGroupMetaData) -> int:
    """Return the number of rows of a row group to read at a time: up to BATCH_ROWS, or about BATCH_BYTES if less."""
    columns = map(group.column, range(group.num_columns))
    size = sum(max(column.total_uncompressed_size, MIN_VALUE_BYTES * column.num_values) for column in columns)
    return max(1, min(BATCH_ROWS, BATCH_BYTES * int(group.num_rows) // max(1, int(size))))


def _read_batch(batch: pa.RecordBatch, row_number: int) -> Iterator[RawRow]:
    """Yield the rows of a batch. Rows that are too long are not converted, and have an error."""
    start, long_rows = 0, []
    if batch.nbytes > MAX_ROW_SIZE:
        sizes = reduce(pc.add, map(_measure_cells, batch.columns))
        long_rows = pc.indices_nonzero(pc.greater(sizes, MAX_ROW_SIZE)).to_pylist()
    for index in long_rows:
        yield from _convert_rows(batch.slice(start, index - start), row_number + start)
        yield RawRow(row_number + index, {}, f"the row has more than {MAX_ROW_SIZE} bytes")
        start = index + 1
    yield from _convert_rows(batch.slice(start), row_number + start)


def _measure_cells(column: pa.Array) -> pa.Array:
    """Return the size of each cell in bytes. Primitive values, such as numbers, count as 0."""
    dtype = column.type
    if types.is_dictionary(dtype):
        sizes = _measure_cells(column.dictionary).take(column.indices)
    elif any(test(dtype) for test in _HAS_LENGTH):
        sizes = pc.binary_length(column).cast(pa.int64())
    elif types.is_primitive(dtype):
        sizes = pa.nulls(len(column), pa.int64())
    else:
        cells = (column.slice(index, 1) for index in range(len(column)))
        sizes = pa.array([to_result_array(cell).nbytes for cell in cells], pa.int64())
    return sizes.fill_null(0)


def _convert_rows(batch: pa.RecordBatch, row_number: int) -> Iterator[RawRow]:
    names = batch.schema.names
    try:
        columns = [to_values(column) for column in batch.columns]
    except ValueError:  # a text is not UTF-8: convert row by row, so that only its own row fails
        yield from (_convert_row(batch.slice(index, 1), row_number + index) for index in range(len(batch)))
    else:
        for index, cells in enumerate(zip(*columns, strict=True)):
            yield RawRow(row_number + index, dict(zip(names, cells, strict=True)))


def _convert_row(batch: pa.RecordBatch, row_number: int) -> RawRow:
    """Convert a batch of one row cell by cell."""
    cells, errors = {}, []
    for name in batch.schema.names:
        try:
            (cells[name],) = to_values(batch.column(name))
        except ValueError as error:
            errors.append(f"column {name!r} cannot be read: {format_error(error)}")
    return RawRow(row_number, cells, "; ".join(errors) or None)
