"""Parts: Parquet files of results, whose pages bear checksums: what a disk has garbled is not taken for results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_infer.atomic import replacing
from batch_infer.carried import converter, result_type, to_array, to_values
from batch_infer.errors import DamagedPart, StorageError, first_line
from batch_infer.records import ResultRow, digest

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image_index", pa.int32()),
        ("prompt", pa.string()),
        ("generated_image", pa.string()),
        ("nsfw_content_detected", pa.bool_()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("negative_prompt", pa.string()),
        ("seed", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_inference_steps", pa.int32()),
        ("guidance_scale", pa.float32()),
        ("guidance_rescale", pa.float32()),
        ("scheduler", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("prompt_truncated", pa.bool_()),
        ("safety_checker", pa.string()),
        ("safety_scores", pa.map_(pa.string(), pa.float32())),
        ("sha256", pa.string()),
        ("image_bytes", pa.int64()),
        ("slots", pa.int32()),
        ("seconds", pa.float32()),
        ("attempt", pa.int32()),
        ("worker", pa.string()),
        ("finished_at", pa.timestamp("us", "UTC")),
        ("source_file", pa.string()),
        ("source_row", pa.int64()),
        ("fingerprint", pa.string()),
    ]
)
"""The result columns, in order; a part's carried columns follow them."""

_FIELDS = [field.name for field in fields(ResultRow) if field.name != "carried"]
if SCHEMA.names != _FIELDS:  # the columns are told twice, here with their types
    raise TypeError(f"records.ResultRow and manifest.SCHEMA differ: {set(_FIELDS) ^ set(SCHEMA.names)}")


def to_table(rows: Sequence[ResultRow], carried: pa.Schema) -> pa.Table:
    """Rows as an Arrow table of the result columns and the carried ones."""
    columns = [pa.array([_cell(row, field.name) for row in rows], field.type) for field in SCHEMA]
    columns += [to_array([row.carried.get(field.name) for row in rows], field.type) for field in carried]
    return pa.table(columns, schema=pa.schema([*SCHEMA, *carried]))


def _cell(row: ResultRow, name: str) -> Any:
    value = getattr(row, name)
    return list(value.items()) if isinstance(value, Mapping) else value


@contextmanager
def opened_part(part: Path) -> Iterator[pq.ParquetFile]:
    """A part, of which nothing is read yet but its foot. Raises DamagedPart, also for what is read while it is open.

    A disk that cannot be read, or a part that has gone meanwhile, is StorageError: it may be back in a moment.
    """
    try:
        with pa.OSFile(str(part)) as stream, pq.ParquetFile(stream, page_checksum_verification=True) as file:
            if (file.schema_arrow.metadata or {}).get(_NAMES_SUM) not in (None, _sum_of(file.schema_arrow)):
                raise DamagedPart(part, "its columns are not those that were written")
            yield file
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        number = getattr(error, "errno", None)  # what the system says has one, what Arrow says of the content has none
        if number is None:
            raise DamagedPart(part, first_line(error).rstrip(".")) from error
        raise StorageError(f"cannot read {part}: {os.strerror(number)}") from error


_NAMES_SUM = b"batch-infer-columns"
"""Where a part keeps the checksum of its columns' names, which those of its pages do not cover.

Not of their types: those of carried columns may read otherwise with another version of Arrow.
"""


def _sum_of(schema: pa.Schema) -> bytes:
    return digest(schema.names).encode()


def read_part(part: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a part, all for None. Raises DamagedPart, StorageError."""
    with opened_part(part) as file:
        for field in SCHEMA if columns is None else (SCHEMA.field(name) for name in columns):
            if field.name not in file.schema_arrow.names:
                raise DamagedPart(part, f"it has no column {field.name}")
            if (found := file.schema_arrow.field(field.name)) != field:
                raise DamagedPart(part, f"its column {field.name} is {found.type}, and not {field.type}")
        table = file.read(None if columns is None else list(columns), use_threads=False)
        table.validate(full=True)
        return table


def write_part(path: Path, table: pa.Table) -> None:
    """Write a part, which appears whole or not at all. Raises StorageError."""
    write_parquet(path, table.schema.with_metadata({_NAMES_SUM: _sum_of(table.schema)}), [table])


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables as one Parquet file that appears whole or not at all. Raises StorageError."""
    with replacing(path, parents=False) as temporary, _parquet_writer(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _parquet_writer(path: Path, schema: pa.Schema) -> closing[pq.ParquetWriter]:
    return closing(pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True))


def as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Results as columns of a schema: of another type where other parts have it so, and null where missing.

    A carried column that the schema does not have stands in it as input_<name>.
    """
    names = {_name_in(schema, name): name for name in table.column_names}
    columns = [
        _converted(table[names[field.name]], field.type) if field.name in names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _name_in(schema: pa.Schema, name: str) -> str:
    new = name
    while new not in schema.names and len(new) < len(name) + 100:
        new = f"input_{new}"
    return new


def _converted(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type == kind:
        return column
    convert = converter(result_type(column.type), kind) or (lambda value: value)
    values = [None if value is None else convert(value) for value in to_values(column)]
    return pa.chunked_array([to_array(values, kind)])
