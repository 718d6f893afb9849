"""The choice among the formats."""

from __future__ import annotations

import csv
from collections.abc import Mapping

import pyarrow as pa

from batch_infer.errors import TableError
from batch_infer.table.columns import MOST_COLUMNS
from batch_infer.table.delimited import Delimited, open_delimited
from batch_infer.table.documents import Document, open_document
from batch_infer.table.endings import TableFile
from batch_infer.table.lines import holds_lines, open_lines
from batch_infer.table.parquet import Parquet, open_parquet
from batch_infer.table.plain import open_plain
from batch_infer.table.raw import Reader
from batch_infer.table.scratch import Scratch
from batch_infer.table.streams import reason, refuse_storage_fault


def open_reader(file: TableFile, prompt: str, scratch: Scratch) -> tuple[Reader, Mapping[str, str]]:
    """A file whose columns are known, and the file's own name of each that has another now, since it has two of it.

    Fields of structs count too, as `column.field`. `prompt` names the file's column of prompts. Raises TableError for
    an unreadable file, StorageError where the disk fails.
    """
    try:
        reader = _open(file, prompt, scratch)
    except (OSError, pa.ArrowException, csv.Error, UnicodeError) as error:
        refuse_storage_fault(error, file.name)
        raise TableError(f"{file.name} cannot be read: {reason(error)}") from error
    if not reader.schema.names:
        raise TableError(f"{file.name} is empty")
    if (count := len(reader.schema.names)) > MOST_COLUMNS:
        raise TableError(f"{file.name} has {count} columns, and {MOST_COLUMNS} are the most: leave out some")
    if isinstance(reader, Parquet):
        return reader, {**reader.renamed, **reader.renamed_fields}
    return reader, reader.renamed if isinstance(reader, (Delimited, Document)) else {}


def _open(file: TableFile, prompt: str, scratch: Scratch) -> Reader:
    match file.format:
        case ".parquet":
            return open_parquet(file, scratch)
        case ".jsonl" | ".ndjson":
            return open_lines(file)
        case ".json":
            return open_lines(file) if holds_lines(file, prompt) else open_document(file, prompt)
        case ".txt":
            return open_plain(file)
        case _:
            return open_delimited(file, prompt)
