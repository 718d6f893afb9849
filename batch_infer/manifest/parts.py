"""Parts: Parquet files of results, whose pages bear checksums: what a disk has garbled is not taken for results."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_infer.carried import make_converter, result_type, to_array, to_values
from batch_infer.errors import DamagedPart, NewerPart, StorageError, first_line
from batch_infer.records import ResultRow, digest
from batch_infer.store import atomic_write

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
        ("pixels_sha256", pa.string()),
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

VERSION = 2
"""The version of SCHEMA. A part records it; parts of version 1 do not."""
_SINCE = {"pixels_sha256": 2}
"""The version in which a result column was added, for those that version 1 does not have. Add to it, never change."""

_FIELDS = [field.name for field in fields(ResultRow) if field.name not in ("carried", "line")]
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


_NAME = re.compile(r"part-(?:(?P<run>[0-9]{5,})-)?.*\.parquet")


def part_name(run: int, content: str) -> str:
    """Return the file name of a part that a run of this number commits; 0 is for a writer that is not a run."""
    return f"part-{run:05d}-{content}.parquet" if run else f"part-{content}.parquet"


def run_number(part: Path) -> int:
    """Return the number of the run that committed a part."""
    match = _NAME.fullmatch(part.name)
    return int(match["run"] or 0) if match else 0


@contextmanager
def opened_part(part: Path) -> Iterator[pq.ParquetFile]:
    """A part, of which nothing is read yet but its foot. Raises DamagedPart, also for what is read while it is open.

    A disk that cannot be read, or a part that has gone meanwhile, is StorageError: it may be back in a moment.
    """
    try:
        with pa.OSFile(str(part)) as stream, pq.ParquetFile(stream, page_checksum_verification=True) as file:
            _check_version(part, _version_of(part, file.schema_arrow))
            yield file
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        number = getattr(error, "errno", None)  # what the system says has one, what Arrow says of the content has none
        if number is None:
            raise DamagedPart(part, first_line(error).rstrip(".")) from error
        raise StorageError(f"cannot read {part}: {os.strerror(number)}") from error


_COLUMNS = b"batch-infer-columns"
"""The metadata key for the version of SCHEMA and a checksum of it and the column names, which no page checksum covers.

The types are not included: those of carried columns may differ when another version of Arrow reads them.
"""


def _columns_mark(version: int, names: Sequence[str]) -> bytes:
    if version == 1:
        return digest(list(names)).encode()
    return f"{version} {digest([version, *names])}".encode()


def _version_of(part: Path, schema: pa.Schema) -> int:
    """Return the version of SCHEMA that a part was written with. Raises DamagedPart."""
    mark = (schema.metadata or {}).get(_COLUMNS)
    first = (mark or b"").partition(b" ")[0]
    version = int(first) if mark and len(first) < 9 and first.isdigit() else 1
    if mark is None and not _SINCE.keys().isdisjoint(schema.names):
        raise DamagedPart(part, "the version of its columns is missing")
    if mark is not None and mark != _columns_mark(version, schema.names):
        raise DamagedPart(part, "its columns are not those that were written")
    return version


def _check_version(part: Path, version: int) -> None:
    if version > VERSION:
        raise NewerPart(
            f"{part} was written by a newer batch-infer (format {version}, this one reads up to {VERSION}): "
            "upgrade batch-infer, or give another --out"
        )


def carried_fields(part: Path, schema: pa.Schema) -> Iterator[pa.Field]:
    """Yield the carried columns of a part as this version names them. Raises DamagedPart."""
    version = _version_of(part, schema)
    for field in schema:
        if _SINCE.get(field.name, 1) > version:
            yield field.with_name(f"input_{field.name}")
        elif field.name not in SCHEMA.names:
            yield field


def read_part(part: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a part, all for None. A column that the part's version did not have is null.

    Raises DamagedPart, NewerPart, StorageError.
    """
    wanted = SCHEMA.names if columns is None else list(columns)
    with opened_part(part) as file:
        version = _version_of(part, file.schema_arrow)
        known = [name for name in wanted if _SINCE.get(name, 1) <= version]
        for field in (SCHEMA.field(name) for name in known):
            if field.name not in file.schema_arrow.names:
                raise DamagedPart(part, f"it has no column {field.name}")
            if (found := file.schema_arrow.field(field.name)) != field:
                raise DamagedPart(part, f"its column {field.name} is {found.type}, and not {field.type}")
        table = file.read(None if columns is None else known, use_threads=False)
        table.validate(full=True)
    return table if len(known) == len(wanted) else _as_this_version(table, wanted, known)


def _as_this_version(table: pa.Table, wanted: Sequence[str], known: Sequence[str]) -> pa.Table:
    """Add the result columns that a part of an earlier version does not have, null, in their place.

    A carried column that has the name of such a column is renamed, as those of tables are.
    """
    added = set(wanted) - set(known)
    table = table.rename_columns([f"input_{name}" if name in added else name for name in table.column_names])
    for place, name in enumerate(wanted):
        if name in added:
            table = table.add_column(place, SCHEMA.field(name), pa.nulls(len(table), SCHEMA.field(name).type))
    return table


_COMMITTED = b"batch-infer-committed"
"""The metadata key for the clock that a part was committed by, and the time on it in seconds."""


def commit_time(part: Path) -> tuple[str, float]:
    """Return which clock a part was committed by, and when. Times of one clock are in the order of the commits.

    A machine's clock starts with its boot, and setting the time of day does not change it. Parts of version 1 have the
    time of day, under the name "". Raises DamagedPart, StorageError.
    """
    with opened_part(part) as file:
        mark = (file.schema_arrow.metadata or {}).get(_COMMITTED, b"").decode("ascii", "replace")
        clock, _, seconds = mark.partition(" ")
        with suppress(ValueError):
            return clock, float(seconds)
        latest = pc.max(read_part(part, ("finished_at",))["finished_at"]).as_py()
        return "", latest.timestamp() if latest else 0.0


def write_part(path: Path, table: pa.Table, clock: str, seconds: float) -> None:
    """Write a part, which appears whole or not at all, with its `commit_time`. Raises StorageError."""
    marks = {_COLUMNS: _columns_mark(VERSION, table.schema.names), _COMMITTED: f"{clock} {seconds:.3f}".encode()}
    write_parquet(path, table.schema.with_metadata(marks), [table])


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables as one Parquet file that appears whole or not at all. Raises StorageError."""
    with atomic_write(path, parents=False) as temporary, _parquet_writer(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _parquet_writer(path: Path, schema: pa.Schema) -> closing[pq.ParquetWriter]:
    return closing(pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True))


def cast_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Results as columns of a schema: of another type where other parts have it so, and null where missing.

    A carried column that the schema does not have is named input_<name> there.
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
    convert = make_converter(result_type(column.type), kind) or (lambda value: value)
    values = [None if value is None else convert(value) for value in to_values(column)]
    return pa.chunked_array([to_array(values, kind)])
