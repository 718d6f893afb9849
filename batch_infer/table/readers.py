"""The choice among the formats."""

from __future__ import annotations

import csv
from collections import Counter

import pyarrow as pa

from batch_infer.errors import TableError
from batch_infer.table.delimited import open_delimited
from batch_infer.table.documents import open_document
from batch_infer.table.endings import TableFile
from batch_infer.table.lines import open_lines
from batch_infer.table.parquet import open_parquet
from batch_infer.table.plain import open_plain
from batch_infer.table.raw import Reader
from batch_infer.table.scratch import Scratch
from batch_infer.table.streams import reason


def open_reader(file: TableFile, prompt: str, scratch: Scratch) -> Reader:
    """A file whose columns are known; `prompt` names its column of prompts. Raises TableError for an unreadable one."""
    try:
        reader = _open(file, prompt, scratch)
        names = reader.schema.names
    except (OSError, pa.ArrowException, csv.Error, UnicodeError) as error:
        raise TableError(f"{file.name} cannot be read: {reason(error)}") from error
    if not names:
        raise TableError(f"{file.name} is empty")
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise TableError(f"{file.name} has two columns named {twice[0]!r}; rename one")
    return reader


def _open(file: TableFile, prompt: str, scratch: Scratch) -> Reader:
    match file.format:
        case ".parquet":
            return open_parquet(file, scratch)
        case ".jsonl" | ".ndjson":
            return open_lines(file)
        case ".json":
            return open_document(file, prompt)
        case ".txt":
            return open_plain(file)
        case _:
            return open_delimited(file, prompt)
