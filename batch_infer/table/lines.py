"""JSON Lines: an object a line, and OpenAI batch files, whose lines hold `custom_id` and `body`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from batch_infer.errors import RowError, TableError
from batch_infer.table.columns import Columns, checked
from batch_infer.table.endings import TableFile
from batch_infer.table.numbers import exact_float
from batch_infer.table.raw import RawRow, broken
from batch_infer.table.streams import BUFFER, Lines, open_bytes, open_text
from batch_infer.table.text import is_utf8

SIZE = re.compile("([0-9]{1,9})[xX]([0-9]{1,9})")
"""https://platform.openai.com/docs/api-reference/images/create: size is WIDTHxHEIGHT or auto."""


PAYLOAD = re.compile(rb'\s*\{\s*("input_data"|"(columns|data|index)"\s*:\s*\[|"parameters"\s*:\s*\{)')
"""How a payload of Azure begins on one line."""
PAYLOAD_KEY = re.compile(rb'"(input_data|columns|data)"\s*:')
LONG_START = 4000
"""Bytes of a first line of which no more is read, so that it is not known whether it is JSON."""


@dataclass(frozen=True, slots=True)
class JsonLines:
    """`count` is of the rows that the schema covers: what is appended while a run goes on is the next run's."""

    file: TableFile
    schema: pa.Schema
    count: int

    def rows(self) -> Iterator[RawRow]:
        known = frozenset(self.schema.names)
        for row in islice(_walk(self.file), self.count):
            yield row if row.error else checked(row, f"line {row.line}", known)


def open_lines(file: TableFile) -> JsonLines:
    """Find out the columns, by a walk over the file. Raises OSError, and TableError where no line can be read."""
    with open_text(file, newline="\n"):
        pass  # what cannot be opened breaks off nowhere
    columns, fault, count = Columns(), None, 0
    for row in _walk(file):
        columns.add(row.cells)
        fault, count = fault or row.error, count + 1
    schema = columns.schema()
    if fault and not schema.names:
        raise TableError(f"{file.name} cannot be read: {fault}")
    return JsonLines(file, schema, count)


def holds_lines(file: TableFile, prompt: str) -> bool:
    """Whether a .json is JSON Lines under another name, as Spark and `datasets.to_json` write it. Raises OSError.

    A document that begins with an object continues with a key, JSON Lines with another object. One line alone is
    JSON Lines where it has a prompt. Only what one read gives is looked at: a document may be one line of any length.
    """
    with open_bytes(file) as stream:
        start = stream.peek(BUFFER)
    first, *others = [line for line in start.split(b"\n") if line.strip()] or [b""]
    if not first.lstrip().startswith(b"{") or PAYLOAD.match(first):
        return False
    if others:
        return others[0].lstrip().startswith(b"{")
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        return len(first) > LONG_START and not PAYLOAD_KEY.search(first)
    return isinstance(found.get(prompt), str)


def _walk(file: TableFile) -> Iterator[RawRow]:
    number, batch = 0, None
    try:
        with open_text(file, newline="\n") as stream:
            lines = Lines(stream)
            while True:
                try:
                    text = next(lines)
                    if text.isspace():
                        continue
                    found = _object(text)
                    batch = _is_batch(found) if batch is None else batch
                    cells, error = _batch_cells(found) if batch else (found, None)
                except StopIteration:
                    return
                except RowError as fault:
                    cells, error = {}, f"line {lines.number} {fault}"
                yield RawRow(number, cells, error, lines.number)
                number += 1
    except OSError as fault:
        yield broken(file, number, fault)


def _object(text: str) -> dict[str, Any]:
    if not is_utf8(text):
        raise RowError("is not UTF-8")
    try:
        found = json.loads(text.rstrip(), parse_float=exact_float)
    except json.JSONDecodeError as error:
        raise RowError(f"is not JSON: {error.msg.removesuffix(' at')}, character {error.pos + 1}") from error
    except ValueError as error:  # a number of thousands of digits
        raise RowError("is not JSON that can be read: a number in it is too long") from error
    except RecursionError as error:
        raise RowError("is nested too deeply") from error
    if not isinstance(found, dict):
        raise RowError(f"is not a JSON object but {type(found).__name__}")
    return found


def _is_batch(found: dict[str, Any]) -> bool:
    return "custom_id" in found and isinstance(found.get("body"), dict)


def _batch_cells(found: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A request's cells under the names of our columns, and the fault of its size."""
    if not _is_batch(found):
        raise RowError("has no custom_id and body, as the first line has")
    cells = {name: value for name, value in found.items() if name not in ("custom_id", "body")}
    body = dict(found["body"])
    count, size = body.pop("n", None), body.pop("size", None)
    if count is not None:
        cells["num_images_per_prompt"] = count
    error = None
    if size not in (None, "", "auto"):
        if isinstance(size, str) and (sides := SIZE.fullmatch(size.strip())):
            cells["width"], cells["height"] = int(sides[1]), int(sides[2])
        else:
            error = f"size {str(size)[:40]!r} is not WIDTHxHEIGHT"
    return {**cells, **body, "id": found["custom_id"]}, error
