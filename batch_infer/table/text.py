"""Read plain text with one prompt per line."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow as pa

from batch_infer.errors import TableError
from batch_infer.table.base import Notice, RawRow, Reader, Scratch, TableFile
from batch_infer.table.fields import format_value
from batch_infer.table.streams import open_bytes, open_text, read_lines

NOT_A_PROMPT = re.compile(r"^\s*(#|//)|(^|\s)--[A-Za-z][\w-]*([\s=]|$)|\s-[A-Za-z][ =]?[0-9.]+(\s|$)")
"""Matches comments, and options of other programs: sd-scripts and AUTOMATIC1111 (`--steps 20`), Midjourney
(`--ar 16:9`) and InvokeAI (`-s50`)."""
LOOKS_LIKE_OPTIONS = (
    "lines of .txt files that look like comments or options and are rendered word for word "
    "(to set parameters for a row, use the columns of a .csv file, or name the file .prompts.txt)"
)


def open_plain_text(file: TableFile, prompt_column: str, scratch: Scratch) -> Reader:
    """Open a plain text file. Raises OSError, StorageError, and TableError if the file is empty or UTF-16."""
    with open_bytes(file) as stream:
        if not stream.peek(1):
            raise TableError(f"{file.name} is empty")
    return Reader(file, pa.schema([("prompt", pa.string())]), {}, lambda: _read_prompts(file))


def _read_prompts(file: TableFile) -> Iterator[RawRow]:
    with open_text(file, newline=None) as stream:
        for row_number, (line, text, error) in enumerate(read_lines(stream)):
            prompt = text.removesuffix("\n")
            yield RawRow(row_number, {} if error else {"prompt": prompt}, error, line, _make_notice(prompt))


def _make_notice(prompt: str) -> Notice | None:
    """Return a notice about a line that other programs would not read as a plain prompt, else None."""
    return Notice(LOOKS_LIKE_OPTIONS, format_value(prompt, 60)) if NOT_A_PROMPT.search(prompt) else None
