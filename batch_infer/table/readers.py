"""The rows of one file, read as a stream: a fault in a row is that row's, and the next one is read."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from batch_infer.errors import TableError, first_line
from batch_infer.table.files import TableFile
from batch_infer.table.text import is_utf8

BATCH = 1024
LONGEST_CELL = 16 << 20
"""Characters of one CSV cell: what a quote that is never closed may swallow before the file is given up."""

csv.field_size_limit(LONGEST_CELL)


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as its file has it, from 0; `error` says why it could not be read."""

    number: int
    cells: dict[str, Any]
    error: str | None = None


def read_schema(file: TableFile) -> pa.Schema:
    """The columns of a file. Raises TableError for a file that cannot be read."""
    try:
        if file.format == ".parquet":
            schema = pq.read_schema(file.path.absolute())
        else:
            schema = pa.schema([(name, pa.string()) for name in _csv_names(file)])
    except (OSError, pa.ArrowException, csv.Error, UnicodeError) as error:
        raise TableError(f"{file.name} cannot be read: {_reason(error)}") from error
    if not schema.names:
        raise TableError(f"{file.name} is empty")
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise TableError(f"{file.name} has two columns named {twice[0]!r}; rename one")
    return schema


def read_rows(file: TableFile) -> Iterator[RawRow]:
    """The rows of a file. A file that breaks off ends with one row that says so."""
    yield from _parquet(file) if file.format == ".parquet" else _csv(file)


def _parquet(file: TableFile) -> Iterator[RawRow]:
    number = 0
    try:
        with pq.ParquetFile(file.path.absolute()) as parquet:
            for batch in parquet.iter_batches(batch_size=BATCH):
                yield from _batch(batch, number)
                number += len(batch)
    except (OSError, pa.ArrowException, UnicodeError) as error:
        yield RawRow(number, {}, f"the file breaks off here: {_reason(error)}")


def _batch(batch: pa.RecordBatch, number: int) -> Iterator[RawRow]:
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # one value that Python cannot hold: it costs its own row
        yield from (_parquet_row(batch.slice(i, 1), number + i) for i in range(len(batch)))
    else:
        yield from (RawRow(number + i, cells) for i, cells in enumerate(rows))


def _parquet_row(batch: pa.RecordBatch, number: int) -> RawRow:
    """A batch of one row, read cell by cell."""
    cells, faults = {}, []
    for name in batch.schema.names:
        try:
            cells[name] = batch.column(name)[0].as_py()
        except (ValueError, OverflowError) as error:
            faults.append(f"column {name!r} cannot be read: {_reason(error)}")
    return RawRow(number, cells, "; ".join(faults) or None)


def _csv(file: TableFile) -> Iterator[RawRow]:
    number = 0
    try:
        with _open_csv(file) as stream:
            reader = csv.reader(stream, strict=True)
            header = _header(reader)
            while True:
                starts = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    lines = _lines(starts, reader.line_num)
                    yield RawRow(number, {}, f"{lines} cannot be read as CSV: {error}; is a quote left open?")
                    number += 1
                    continue
                if not cells:  # a blank line
                    continue
                yield _csv_row(number, header, cells, _lines(starts, reader.line_num))
                number += 1
    except OSError as error:
        yield RawRow(number, {}, f"the file breaks off here: {_reason(error)}")


def _csv_row(number: int, header: list[str], cells: list[str], lines: str) -> RawRow:
    error = None
    if len(cells) > len(header):
        error = f"{lines} has {len(cells)} cells where the header names {len(header)}; quote cells that hold commas"
    # A short row has left its last cells out; strict=False also covers the overlong one, which is refused.
    return RawRow(number, dict(zip(header, cells, strict=False)), error)


def _open_csv(file: TableFile) -> TextIO:
    """Bytes that are not UTF-8 come as lone surrogates, so that they cost their own row and no other."""
    with file.path.open("rb") as stream:
        start = stream.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TableError(f"{file.name} is UTF-16; save it as UTF-8")
    return file.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_names(file: TableFile) -> list[str]:
    with _open_csv(file) as stream:
        names = _header(csv.reader(stream, strict=True))
    if not all(map(is_utf8, names)):
        raise TableError(f"{file.name} has a header that is not UTF-8; save it as UTF-8")
    return names


def _header(reader: Any) -> list[str]:
    return next((cells for cells in reader if cells), [])


def _lines(first: int, last: int) -> str:
    return f"line {first}" if first >= last else f"lines {first} to {last}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
