"""The table formats: a registry of endings, and the format of a name, of an opened file and of standard input."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pyarrow as pa

from batch_infer.errors import TableError
from batch_infer.table.base import Reader, Scratch, TableFile, clean, error_text, raise_storage_error
from batch_infer.table.columns import MAX_COLUMNS
from batch_infer.table.delimited import open_delimited
from batch_infer.table.json import open_json
from batch_infer.table.jsonl import open_jsonl
from batch_infer.table.parquet import open_parquet
from batch_infer.table.streams import COMPRESSIONS, LONGEST, MAGIC_BYTES, UTF_8_MARK, open_decompressed
from batch_infer.table.text import open_plain_text

FORMATS: dict[str, Callable[[TableFile, str, Scratch], Reader]] = {
    ".csv": open_delimited,
    ".tsv": open_delimited,
    ".parquet": open_parquet,
    ".pq": open_parquet,
    ".parq": open_parquet,
    ".jsonl": open_jsonl,
    ".ndjson": open_jsonl,
    ".json": open_json,
    ".txt": open_plain_text,
}
"""Each ending with the function that opens its files, given the column of the prompts and a temporary folder."""


def _join(endings: list[str]) -> str:
    return f"{', '.join(endings[:-1])} or {endings[-1]}"


ENDINGS = f"{_join(list(FORMATS))}, also with {_join(list(COMPRESSIONS))} after it"
_FORMAT, _COMPRESSION = ("|".join(map(re.escape, endings)) for endings in (FORMATS, COMPRESSIONS))
_NAME = re.compile(f"(?P<stem>.*[^/])(?P<format>{_FORMAT})(?P<compression>{_COMPRESSION})?", re.IGNORECASE | re.DOTALL)


class TableName(NamedTuple):
    """The parts of a table's path: the stem of its default ids, its format and its compression."""

    stem: str
    format: str
    compression: str


def parse_name(relative: str) -> TableName | None:
    """Return the parts of a path that ends as a table does, else None."""
    match = _NAME.fullmatch(relative)
    if match is None:
        return None
    return TableName(_to_stem(match["stem"]), match["format"].lower(), (match["compression"] or "").lower())


def stem_of(name: str) -> str:
    """Return the stem of default ids for any name, also one that does not end as a table does."""
    parts = parse_name(name)
    return parts.stem if parts else _to_stem(name.rpartition(".")[0] or name)


def _to_stem(relative: str) -> str:
    return clean(relative).replace("/", "-")


def open_reader(file: TableFile, prompt_column: str, scratch: Scratch) -> Reader:
    """Open a file. Raises TableError where it cannot be read, StorageError where the disk fails."""
    try:
        reader = FORMATS[file.format](file, prompt_column, scratch)
    except (OSError, pa.ArrowException, csv.Error, UnicodeError) as error:
        raise_storage_error(error, file.name)
        raise TableError(f"{file.name} cannot be read: {error_text(error)}") from error
    if not reader.schema.names:
        raise TableError(f"{file.name} is empty")
    if (count := len(reader.schema.names)) > MAX_COLUMNS:
        raise TableError(f"{file.name} has {count} columns, and {MAX_COLUMNS} are the most: leave out some")
    return reader


def detect_format(file: TableFile) -> TableFile:
    """Return a file without a name with the format and compression that its first bytes show. Raises OSError."""
    with file.path.open("rb") as stream:
        start = stream.read(MAGIC_BYTES)
    compression = next((ending for ending, kind in COMPRESSIONS.items() if kind.magic.match(start)), "")
    file = replace(file, compression=compression)
    try:
        with open_decompressed(file) as content:
            start = content.peek(4)[:4]
            content.read(len(UTF_8_MARK) if start.startswith(UTF_8_MARK) else 0)
            lines = (text for line in iter(lambda: content.readline(LONGEST), b"") if (text := line.strip()))
            is_parquet = start == b"PAR1"
            return replace(file, format=".parquet" if is_parquet else _text_format(next(lines, b""), next(lines, b"")))
    except OSError:  # compressed, and damaged at the start: reading it as a table reports that
        return replace(file, format=".csv")


def _text_format(first: bytes, second: bytes) -> str:
    """Return the format of a text with these first lines that are not blank."""
    if first.startswith(b"["):
        return ".json"
    if not first.startswith(b"{"):
        return ".csv"
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):  # an object continues with a key, JSON Lines with another object
        return ".jsonl" if second.startswith(b"{") else ".json"
    is_payload = "input_data" in value or ("columns" in value and "data" in value)
    return ".json" if is_payload else ".jsonl"
