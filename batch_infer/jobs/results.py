"""results.*: tables of results as files, in the formats that were asked for."""

from __future__ import annotations

import base64
import csv
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from batch_infer.carried import to_python_values
from batch_infer.settings import OutputSettings
from batch_infer.sinks import Sink, make_sink
from batch_infer.store import atomic_write

_Write = Callable[[pa.Table], None]

log = logging.getLogger("batch_infer")


def write_results(tables: Iterable[pa.Table], schema: pa.Schema, out: Path, output: OutputSettings) -> None:
    """Write all tables, each of this schema, to results.parquet and the other formats. Raises StorageError."""
    with ExitStack() as stack:
        kinds = dict.fromkeys(("parquet", *output.results))
        writers = [_open(stack, out, kind, schema, output.base64) for kind in kinds]
        for table in tables:
            for write in writers:
                write(table)


def remove_other_results(out: Path, output: OutputSettings) -> None:
    """Remove what an earlier run wrote in formats that are not asked for any more: it is out of date now."""
    for kind in {"csv", "jsonl"} - set(output.results):
        (out / f"results.{kind}").unlink(missing_ok=True)


def _open(stack: ExitStack, out: Path, kind: str, schema: pa.Schema, as_base64: bool) -> _Write:
    temporary = stack.enter_context(atomic_write(out / f"results.{kind}", parents=False))
    if kind == "parquet":
        write: _Write = stack.enter_context(pq.ParquetWriter(temporary, schema, compression="zstd")).write_table
        return write
    stream = stack.enter_context(temporary.open("w", encoding="utf-8", newline=""))
    images = make_sink(out) if as_base64 else None
    return (_Csv(stream, schema, images) if kind == "csv" else _Jsonl(stream, images)).write


class _Csv:
    def __init__(self, stream: TextIO, schema: pa.Schema, images: Sink | None) -> None:
        self._writer, self._images = csv.writer(stream), images
        self._writer.writerow(schema.names)

    def write(self, table: pa.Table) -> None:
        for row in _rows(table, self._images):
            self._writer.writerow(_csv_cell(value) for value in row.values())


class _Jsonl:
    def __init__(self, stream: TextIO, images: Sink | None) -> None:
        self._stream, self._images = stream, images

    def write(self, table: pa.Table) -> None:
        for row in _rows(table, self._images):
            self._stream.write(to_json(row) + "\n")


def _rows(table: pa.Table, images: Sink | None) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries; with `images`, generated_image is the file itself in base64, as Azure's card has it."""
    for cells in zip(*map(to_python_values, table.columns), strict=True):
        row = dict(zip(table.column_names, cells, strict=True))
        if images is not None and row["generated_image"] is not None:
            row["generated_image"] = _file(images, row["generated_image"])
        for name in ("guidance_scale", "guidance_rescale", "seconds"):
            row[name] = shorten_float32(row[name])
        if row["safety_scores"] is not None:
            row["safety_scores"] = {name: shorten_float32(score) for name, score in row["safety_scores"]}
        yield row


def _file(images: Sink, name: str) -> bytes | None:
    """Return an image, or None where it was deleted or is not a file of ours: that costs no other row its result.

    Raises StorageError where it is there and cannot be read.
    """
    content = images.read(name)
    if content is None:
        log.warning("%s is missing, or is not an image of this run, so it is left out", name)
    return content


def shorten_float32(value: float | None) -> float | None:
    """A float32 with the digits that it has, and not those of the double it was read into."""
    return None if value is None else float(f"{value:.7g}")


def _csv_cell(value: Any) -> Any:
    match value:
        case bool():
            return "true" if value else "false"
        case Mapping() | list():
            return to_json(value)
        case datetime() | bytes():
            return _text(value)
        case _:
            return value


def to_json(value: Any) -> str:
    """A value in JSON, whatever it holds: null for a number that is none, text for what JSON has no type for."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_text)


def _finite(value: Any) -> Any:
    """A value with null for the numbers that JSON does not have, as pandas writes them."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _finite(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case _:
            return value


def _text(value: Any) -> str:
    """A value that JSON and CSV have no type for."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
