"""Merging: the manifest's parts as results.*, in input order."""

from __future__ import annotations

import base64
import csv
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from batch_infer.atomic import replacing
from batch_infer.manifest import SCHEMA, Committed, Index
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.settings import OutputSettings

BATCH = 2048
Item = PromptRequest | ResultRow
_Write = Callable[[pa.Table], None]

log = logging.getLogger("batch_infer")


@dataclass(slots=True)
class Counts:
    """What became of a table: its rows, and results (a row has one for each image) by status; `left` have none yet."""

    rows: int = 0
    images: int = 0
    ok: int = 0
    flagged: int = 0
    blocked: int = 0
    invalid: int = 0
    failed: int = 0
    left: int = 0
    bad_rows: int = 0
    """Rows, and not images, that failed or were invalid."""

    def add(self, status: str, number: int) -> None:
        setattr(self, status, getattr(self, status) + number)


def merge(items: Iterable[Item], index: Index, carried: pa.Schema, out: Path, output: OutputSettings) -> Counts:
    """Write the results of these items, in their order, and count them. Raises StorageError."""
    counts = Counts()
    with ExitStack() as stack:
        schema = pa.schema([*SCHEMA, *carried])
        writers = [
            _open(stack, out, kind, schema, output.base64) for kind in dict.fromkeys(("parquet", *output.results))
        ]
        for table in _tables(items, index, carried, counts):
            for write in writers:
                write(table)
    for kind in {"csv", "jsonl"} - set(output.results):
        (out / f"results.{kind}").unlink(missing_ok=True)  # an earlier run's, which is out of date now
    return counts


def _tables(items: Iterable[Item], index: Index, carried: pa.Schema, counts: Counts) -> Iterator[pa.Table]:
    for batch in _batches(items):
        found = [(item, kept) for item in batch if (kept := _result_of(item, index)) is not None]
        counts.rows += len({_place(item) for item in batch})
        counts.bad_rows += len({_place(item) for item, kept in found if kept.status in ("failed", "invalid")})
        counts.left += len(batch) - len(found)
        if found:
            table = _as_now([item for item, _ in found], index.take([kept for _, kept in found]), carried)
            for status, number in Counter(table["status"].to_pylist()).items():
                counts.add(status, number)
            counts.images += len(table) - table["generated_image"].null_count
            yield table


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in batches that part no row from its images."""
    batch: list[Item] = []
    for _, images in groupby(items, _place):
        batch.extend(images)
        if len(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _result_of(item: Item, index: Index) -> Committed | None:
    """What is committed of an item as it stands in the table now; a result of what it was before does not count."""
    kept = index.find(item.key)
    return kept if kept is not None and kept.fingerprint == item.fingerprint else None


def _place(item: Item) -> tuple[str, int]:
    return (
        (item.source.file, item.source.row) if isinstance(item, PromptRequest) else (item.source_file, item.source_row)
    )


def _as_now(items: list[Item], table: pa.Table, carried: pa.Schema) -> pa.Table:
    """Results with the place and the carried columns that the table has now: neither changes an image."""
    places = [_place(item) for item in items]
    table = table.set_column(
        table.column_names.index("source_file"), SCHEMA.field("source_file"), [[p[0] for p in places]]
    )
    table = table.set_column(
        table.column_names.index("source_row"), SCHEMA.field("source_row"), [[p[1] for p in places]]
    )
    for field in carried:
        table = table.append_column(field, pa.array([item.carried.get(field.name) for item in items], field.type))
    return table


def _open(stack: ExitStack, out: Path, kind: str, schema: pa.Schema, as_base64: bool) -> _Write:
    temporary = stack.enter_context(replacing(out / f"results.{kind}"))
    if kind == "parquet":
        write: _Write = stack.enter_context(pq.ParquetWriter(temporary, schema, compression="zstd")).write_table
        return write
    stream = stack.enter_context(temporary.open("w", encoding="utf-8", newline=""))
    images = out if as_base64 else None
    return (_Csv(stream, schema, images) if kind == "csv" else _Jsonl(stream, images)).write


class _Csv:
    def __init__(self, stream: TextIO, schema: pa.Schema, images: Path | None) -> None:
        self._writer, self._images = csv.writer(stream), images
        self._writer.writerow(schema.names)

    def write(self, table: pa.Table) -> None:
        for row in _rows(table, self._images):
            self._writer.writerow(_csv_cell(value) for value in row.values())


class _Jsonl:
    def __init__(self, stream: TextIO, images: Path | None) -> None:
        self._stream, self._images = stream, images

    def write(self, table: pa.Table) -> None:
        for row in _rows(table, self._images):
            self._stream.write(_json(row) + "\n")


def _rows(table: pa.Table, images: Path | None) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries; with `images`, generated_image is the file itself in base64, as Azure's card has it."""
    for row in table.to_pylist():
        if images is not None and row["generated_image"] is not None:
            row["generated_image"] = _file(images / row["generated_image"])
        for name in ("guidance_scale", "guidance_rescale", "seconds"):
            row[name] = _short(row[name])
        if row["safety_scores"] is not None:
            row["safety_scores"] = {name: _short(score) for name, score in row["safety_scores"]}
        yield row


def _file(path: Path) -> bytes | None:
    """An image, or None where somebody has deleted it: that costs no other row its result."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        log.warning("%s is missing", path)
        return None


def _short(value: float | None) -> float | None:
    """A float32 with the digits that it has, and not those of the double it was read into."""
    return None if value is None else float(f"{value:.7g}")


def _csv_cell(value: Any) -> Any:
    match value:
        case bool():
            return "true" if value else "false"
        case Mapping() | list():
            return _json(value)
        case datetime() | bytes():
            return _text(value)
        case _:
            return value


def _json(value: Any) -> str:
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
