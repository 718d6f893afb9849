"""Read and write manifest parts, which are Parquet files with page checksums to detect damage."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_infer.errors import DamagedPartError, NewerPartError, StorageError, first_line
from batch_infer.manifest.columns import RETYPED, SCHEMA, SINCE, VERSION, field_at, upgrade_table
from batch_infer.records import digest
from batch_infer.store import StoredFile, to_stored_file

Part: TypeAlias = StoredFile | Path
"""A manifest part: a file of OUT's store, or a path on this machine."""
BATCH = 8192
_NAME = re.compile(r"part-(?:(?P<run>[0-9]{5,})-)?.*\.parquet")
_COLUMNS_KEY = b"batch-infer-columns"
"""Metadata key of the format version (except in version 1) and a checksum of the column names.

Page checksums do not cover the names. The checksum omits types: another version of Arrow may read carried columns as
different types.
"""
_COMMITTED_KEY = b"batch-infer-committed"
"""Metadata key of the commit time: the name of the clock, and seconds."""


def run_number(part: Part) -> int:
    """Return the number of the run that committed a part, or 0 if its name has no number."""
    match = _NAME.fullmatch(part.name)
    return int(match["run"] or 0) if match else 0


def make_part_name(run: int, rows: Iterable[tuple[str, int, str, int]]) -> str:
    """Return the name of a part of a run, or of no run if it is 0.

    It contains a digest of the id, image index, fingerprint and attempt of each row.
    """
    content = digest(list(map(list, rows)))
    return f"part-{run:05d}-{content}.parquet" if run else f"part-{content}.parquet"


def write_part(part: Part, table: pa.Table, clock: str, seconds: float) -> None:
    """Write a part atomically, with its `commit_time`. Raises StorageError."""
    columns = _columns_mark(VERSION, table.schema.names)
    marked = table.replace_schema_metadata({_COLUMNS_KEY: columns, _COMMITTED_KEY: f"{clock} {seconds:.3f}"})
    file = to_stored_file(part)
    with file.store.write(file.path) as temporary:
        pq.write_table(marked, temporary, compression="zstd", write_page_checksum=True)


def read_part(part: Part, columns: Sequence[str] | None = None) -> pa.Table:
    """Read these result columns of a part, or all its columns if None.

    Result columns added after the part's version are null. Raises DamagedPartError, NewerPartError, StorageError.
    """
    names = SCHEMA.names if columns is None else list(columns)
    with open_part(part) as (file, version):
        available = [name for name in names if SINCE.get(name, 1) <= version]
        _check_columns(part, file.schema_arrow, available, version)
        table = file.read(None if columns is None else available, use_threads=False)
        table.validate(full=True)
    is_current = len(available) == len(names) and all(RETYPED.get(name, 1) <= version for name in names)
    return table if is_current else upgrade_table(table, names, version)


def read_part_in_batches(part: Part, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield a part in tables of at most BATCH rows, with these result columns, or all that its version has if None.

    Values have the types of that version.
    A part may be too large for memory. Raises DamagedPartError, NewerPartError, StorageError.
    """
    with open_part(part) as (file, version):
        names = list(columns or SCHEMA.names)
        _check_columns(part, file.schema_arrow, [name for name in names if SINCE.get(name, 1) <= version], version)
        for batch in file.iter_batches(BATCH, columns=columns, use_threads=False):
            batch.validate(full=True)
            yield pa.Table.from_batches([batch])


def _check_columns(part: Part, schema: pa.Schema, names: Sequence[str], version: int) -> None:
    """Raise DamagedPartError unless a part has these result columns, with the types of its format version."""
    for field in (field_at(name, version) for name in names):
        if field.name not in schema.names:
            raise DamagedPartError(str(part), f"it has no column {field.name}")
        actual = schema.field(field.name)
        if actual != field:
            raise DamagedPartError(
                str(part), f"its column {field.name} has the type {actual.type} instead of {field.type}"
            )


def read_carried_fields(part: Part) -> list[pa.Field]:
    """Return a part's carried columns under their names in this version.

    Raises DamagedPartError, NewerPartError, StorageError.
    """
    with open_part(part) as (file, version):
        schema = file.schema_arrow
    added = {name for name, since in SINCE.items() if since > version}
    carried = (field for field in schema if field.name in added or field.name not in SCHEMA.names)
    return [field.with_name(f"input_{field.name}") if field.name in added else field for field in carried]


def commit_time(part: Part) -> tuple[str, float]:
    """Return the name of a clock and the commit time in seconds. Times of a named clock are in commit order.

    A named clock starts when its machine boots, and setting the time of day does not change it. A part of version 1 has
    no commit time: its clock is "", and the seconds are the time of day at which its last row finished. Raises
    DamagedPartError, NewerPartError, StorageError.
    """
    with open_part(part) as (file, _):
        if (time := _read_commit_time(file.schema_arrow)) is not None:
            return time
        latest = pc.max(read_part(part, ("finished_at",))["finished_at"]).as_py()
        return "", latest.timestamp() if latest else 0.0


def _read_commit_time(schema: pa.Schema) -> tuple[str, float] | None:
    mark = (schema.metadata or {}).get(_COMMITTED_KEY, b"").decode("ascii", "replace")
    clock, _, seconds = mark.partition(" ")
    with suppress(ValueError):
        return clock, float(seconds)
    return None


@dataclass(frozen=True, slots=True)
class Footer:
    """What the footer of a part of the current format version says. `seconds` is the commit time by `clock`."""

    rows: int
    schema: pa.Schema
    clock: str
    seconds: float


def read_footer(part: Part) -> Footer | None:
    """Read a part's footer, or return None if it has another format version.

    Raises DamagedPartError, NewerPartError, StorageError.
    """
    with open_part(part) as (file, version):
        schema = file.schema_arrow
        time = _read_commit_time(schema)
        if version != VERSION or time is None:
            return None
        return Footer(file.metadata.num_rows, schema.remove_metadata(), *time)


@contextmanager
def open_part(part: Part) -> Iterator[tuple[pq.ParquetFile, int]]:
    """Open a part, read only its footer, and yield the file with its format version.

    Raises NewerPartError, DamagedPartError, StorageError. A missing part and a disk that cannot be read are not damage,
    because either may be temporary: they raise StorageError. Errors of reads inside the context are converted too.
    """
    part = to_stored_file(part)
    try:
        with part.store.open_file(part.path) as stream, pq.ParquetFile(stream, page_checksum_verification=True) as file:
            version = _version_of(part, file.schema_arrow)
            if version > VERSION:
                raise NewerPartError(
                    f"{part} was written by a newer batch-infer (format {version}, this one reads up to {VERSION}):"
                    " upgrade batch-infer, or give another --out"
                )
            yield file, version
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        number = getattr(error, "errno", None)  # None for Arrow's errors about the content
        if number is None:
            raise DamagedPartError(str(part), first_line(error).rstrip(".")) from error
        raise StorageError(f"cannot read {part}: {os.strerror(number)}") from error


def _columns_mark(version: int, names: Sequence[str]) -> bytes:
    if version == 1:
        return digest(list(names)).encode()
    return f"{version} {digest([version, *names])}".encode()


def _version_of(part: Part, schema: pa.Schema) -> int:
    """Return a part's format version. Raises DamagedPartError."""
    mark = (schema.metadata or {}).get(_COLUMNS_KEY)
    first = (mark or b"").partition(b" ")[0]
    version = int(first) if mark and len(first) < 9 and first.isdigit() else 1
    if mark is None and not SINCE.keys().isdisjoint(schema.names):
        raise DamagedPartError(str(part), "the version of its columns is missing")
    if mark is not None and mark != _columns_mark(version, schema.names):
        raise DamagedPartError(str(part), "its columns are not those that were written")
    return version
