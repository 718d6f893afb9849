"""Register the table formats, and detect the format of a file from its name or content."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace

from batch_infer.errors import TableError
from batch_infer.table.base import (
    MAX_COLUMNS,
    READ_ERRORS,
    Reader,
    Scratch,
    TableFile,
    format_error,
    raise_storage_error,
    replace_surrogates,
)
from batch_infer.table.delimited import open_delimited
from batch_infer.table.json import open_json
from batch_infer.table.jsonl import open_jsonl
from batch_infer.table.parquet import open_parquet
from batch_infer.table.prompt_lines import open_prompt_lines
from batch_infer.table.streams import COMPRESSIONS, MAGIC_BYTES, MAX_ROW_SIZE, UTF_8_MARK, open_decompressed
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
    ".prompts.txt": open_prompt_lines,
}
"""Functions that open a file, by its suffix. They also take the name of the prompt column and a temporary folder."""


def _join(suffixes: list[str]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


TABLE_SUFFIXES = f"{_join(list(FORMATS))}, also with {_join(list(COMPRESSIONS))} after it"
_FORMAT, _COMPRESSION = ("|".join(map(re.escape, suffixes)) for suffixes in (FORMATS, COMPRESSIONS))
_NAME = re.compile(f"(?P<stem>.*?[^/])(?P<format>{_FORMAT})(?P<compression>{_COMPRESSION})?", re.IGNORECASE | re.DOTALL)


def parse_name(relative: str) -> tuple[str, str, str] | None:
    """Return the stem (for default ids), format and compression of a path, or None if it has no table suffix."""
    match = _NAME.fullmatch(relative)
    if match is None:
        return None
    return _to_stem(match["stem"]), match["format"].lower(), (match["compression"] or "").lower()


def get_stem(name: str) -> str:
    """Return a path's stem for default ids. The path need not have a table suffix."""
    parts = parse_name(name)
    return parts[0] if parts else _to_stem(name.rpartition(".")[0] or name)


def _to_stem(relative: str) -> str:
    return replace_surrogates(relative).replace("/", "-")


def open_reader(file: TableFile, prompt_column: str, scratch: Scratch) -> Reader:
    """Open a file.

    Raises TableError if it cannot be read, is empty or has too many columns, and StorageError if the disk fails or the
    temporary folder is full.
    """
    try:
        reader = FORMATS[file.format](file, prompt_column, scratch)
    except (*READ_ERRORS, csv.Error) as error:
        raise_storage_error(error, file.name)
        raise TableError(f"{file.name} cannot be read: {format_error(error)}") from error
    if not reader.schema.names:
        raise TableError(f"{file.name} is empty")
    if (count := len(reader.schema.names)) > MAX_COLUMNS:
        raise TableError(f"{file.name} has {count} columns; the maximum is {MAX_COLUMNS}: leave out some")
    return reader


def detect_format(file: TableFile) -> TableFile:
    """Return a file with the format and compression that its content suggests. Raises OSError, StorageError."""
    with file.path.open("rb") as stream:
        start = stream.read(MAGIC_BYTES)
    compression = next((suffix for suffix, candidate in COMPRESSIONS.items() if candidate.magic.match(start)), "")
    file = replace(file, compression=compression)
    try:
        with open_decompressed(file) as content:
            start = content.peek(4)[:4]
            if start == b"PAR1":
                return replace(file, format=".parquet")
            if start.startswith(UTF_8_MARK):
                content.read(len(UTF_8_MARK))
            nonblank = filter(None, map(bytes.strip, iter(lambda: content.readline(MAX_ROW_SIZE), b"")))
            return replace(file, format=_detect_text_format(next(nonblank, b""), next(nonblank, b"")))
    except OSError:  # damaged compressed data, which `open_reader` reports whatever the format
        return replace(file, format=".csv")


def _detect_text_format(first: bytes, second: bytes) -> str:
    """Return the format of a text from its first two nonblank lines."""
    if first.startswith(b"["):
        return ".json"
    if not first.startswith(b"{"):
        return ".csv"
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):  # a document continues with a key, JSON Lines with another object
        return ".jsonl" if second.startswith(b"{") else ".json"
    is_payload = "input_data" in value or ("columns" in value and "data" in value)
    return ".json" if is_payload else ".jsonl"
