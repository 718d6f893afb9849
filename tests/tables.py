"""Helpers that write tables and read them as batch-infer does."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_infer.carried import to_array
from batch_infer.manifest import SCHEMA
from batch_infer.records import PromptRequest, ResultRow, SizeRules
from batch_infer.settings import IdSource, RowDefaults, TableSettings
from batch_infer.table import RowRules, Tables

RULES = RowRules(
    RowDefaults(num_inference_steps=20, guidance_scale=5.0, guidance_rescale=0.0, height=64, width=64),
    SizeRules(native_height=64, native_width=64, side_multiple=8, min_side=16),
    fingerprint="the run",
)
"""Rules for rows of a model whose images are 64 pixels wide by default."""


def write_csv(path: Path, rows: Iterable[Sequence[Any]], **form: Any) -> Path:
    """Write a CSV file of these rows, the first of which is the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, **form).writerows(rows)
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    """Write a Parquet file of these columns: lists, or Arrow arrays if the type matters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def open_tables(
    *tables: Path | str,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    folder: Path = Path(),
    id_from: IdSource = "row",
) -> Tables:
    return Tables(TableSettings(tuple(map(str, tables)), columns or {}, limit, folder, id_from), SCHEMA.names)


def read(*tables: Path | str, rules: RowRules = RULES, **options: Any) -> list[PromptRequest | ResultRow]:
    """Read all rows of tables, and check that carried cells fit into the results."""
    with open_tables(*tables, **options) as opened:
        items = list(opened.read_rows(rules))
        for field in opened.carried:
            to_array([item.carried.get(field.name) for item in items], field.type).validate(full=True)
    return items


def read_requests(*tables: Path | str, **options: Any) -> list[PromptRequest]:
    """Read all rows of tables, which must be valid."""
    items = read(*tables, **options)
    assert not (errors := [item.error for item in items if isinstance(item, ResultRow)]), errors
    return [item for item in items if isinstance(item, PromptRequest)]


def error_of(*tables: Path | str, **options: Any) -> str:
    """Return the error of the only row of a table."""
    (item,) = read(*tables, **options)
    assert isinstance(item, ResultRow), item
    assert item.status == "invalid"
    assert item.error
    return item.error


ROWS: list[dict[str, Any]] = [
    {"prompt": "a red circle", "height": 128, "guidance_scale": 7.5, "tag": "first"},
    {"prompt": "zwei, drei\nÄpfel 🎨", "height": None, "guidance_scale": None, "tag": None},
    {"prompt": 'say "square"', "height": 64, "guidance_scale": 1, "tag": "é"},
]
"""A table that every format except plain text can represent."""


def in_format(suffix: str, rows: list[dict[str, Any]]) -> bytes:
    """Encode a table as the content of a file with this suffix. Raises ValueError for an unknown suffix."""
    suffix, _, compression = suffix.lstrip(".").partition(".")
    names = list(rows[0]) if rows else []
    if compression:
        return compress(compression, in_format(suffix, rows))
    if suffix in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="\t" if suffix == "tsv" else ",")
        writer.writerows([names, *([row[name] for name in names] for row in rows)])
        return text.getvalue().encode()
    if suffix in ("jsonl", "ndjson"):
        return "".join(f"{exact_json(row, ensure_ascii=False)}\n" for row in rows).encode()
    if suffix == "json":
        return exact_json(rows).encode()
    if suffix == "txt":
        return "".join(f"{row['prompt']}\n" for row in rows).encode()
    if suffix not in ("parquet", "pq", "parq"):
        raise ValueError(f"no encoder for .{suffix}")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def exact_json(value: Any, **form: Any) -> str:
    """Encode a value as JSON in which a Decimal is a number with all its digits."""
    text = json.dumps(value, default=lambda number: f"\0{number}\0", **form)
    return re.sub(r'"\\u0000([^"\\]*)\\u0000"', r"\1", text)


def compress(compression: str, content: bytes) -> bytes:
    compressors: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    if compression in compressors:
        return compressors[compression](content)
    return bytes(pa.compress(content, "zstd", asbytes=True))


def comparable_rows(requests: Iterable[PromptRequest]) -> list[tuple[Any, ...]]:
    """Return the values of requests that must not depend on the format of a table.

    Empty texts become None, since some formats do not distinguish them from missing cells.
    """
    return [
        (
            *(request.id, request.prompt, request.seed, request.params, request.fingerprint, request.source.row),
            {name: None if cell == "" else cell for name, cell in request.carried.items()},
        )
        for request in requests
    ]


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of results, of any version, with safety scores by category."""
    rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="strict")
    for row in rows:
        if isinstance(scores := row.get("safety_scores"), list):
            row["safety_scores"] = {score["category"]: score["score"] for score in scores}
    return rows
