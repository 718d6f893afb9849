"""A table on standard input: kept in a file, as it is read more than once, and of the format that it begins like."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from io import BufferedReader

from batch_infer.errors import TableError
from batch_infer.store import create_temporary
from batch_infer.table.endings import TableFile
from batch_infer.table.scratch import Scratch
from batch_infer.table.streams import (
    BUFFER,
    LONGEST,
    MAGIC,
    MAGIC_BYTES,
    UTF_8_MARK,
    open_unpacked,
    reason,
    refuse_storage_fault,
)

NAME = "stdin"


def spool(scratch: Scratch) -> TableFile:
    """Keep all of standard input in a file. Raises TableError, StorageError."""
    if sys.stdin is None or sys.stdin.closed:
        raise TableError("-: there is no standard input to read")
    if sys.stdin.isatty():
        raise TableError("-: standard input is a terminal; pipe a table in (batch-infer run - < prompts.csv)")
    try:
        place = scratch.place()
        with create_temporary(place) as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy, BUFFER)
        return _sniffed(TableFile(place, NAME, NAME, origin="stdin"))
    except OSError as error:
        refuse_storage_fault(error, "standard input")
        raise TableError(f"-: standard input cannot be read: {reason(error)}") from error


def _sniffed(file: TableFile) -> TableFile:
    with file.path.open("rb") as stream:
        start = stream.read(MAGIC_BYTES)
    packing = next((packing for packing, magic in MAGIC.items() if magic.match(start)), "")
    file = replace(file, packing=packing)
    try:
        with open_unpacked(file) as unpacked:
            start = unpacked.peek(4)[:4]
            unpacked.read(len(UTF_8_MARK) if start.startswith(UTF_8_MARK) else 0)
            if start == b"PAR1":
                return replace(file, format=".parquet")
            return replace(file, format=_text_format(_next_line(unpacked), _next_line(unpacked)))
    except OSError:  # packed, and damaged at once: reading it as a table says so
        return replace(file, format=".csv")


def _next_line(stream: BufferedReader) -> bytes:
    while line := stream.readline(LONGEST):
        if text := line.strip():
            return text
    return b""


def _text_format(line: bytes, second: bytes) -> str:
    """The format of a text by its first two lines that are not blank."""
    if line.startswith(b"["):
        return ".json"
    if not line.startswith(b"{"):
        return ".csv"
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # an object goes on with a key, and lines of objects with another object
        return ".jsonl" if second.startswith(b"{") else ".json"
    payload = "input_data" in found or ("columns" in found and "data" in found)
    return ".json" if payload else ".jsonl"
