"""Read JSON Lines with one object per line, and OpenAI batch files, whose lines contain `custom_id` and `body`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import islice
from typing import Any

from batch_infer.carried import JsonNumber
from batch_infer.errors import RowError, TableError
from batch_infer.table.base import RawRow, Reader, Scratch, TableFile, broken_off_row, is_utf8
from batch_infer.table.columns import JsonColumns, check_row
from batch_infer.table.streams import LineReader, open_text

SIZE = re.compile("([0-9]{1,9})[xX]([0-9]{1,9})")
"""https://platform.openai.com/docs/api-reference/images/create: size is WIDTHxHEIGHT or auto."""
FLOAT_DIGITS = 15
"""Maximum number of decimal digits that always survive conversion to float and back (IEEE 754 binary64)."""
MAX_INTEGER_DIGITS = 4000
"""Maximum number of digits to convert to an integer. Python's own limit is 4300."""


def open_jsonl(file: TableFile, prompt_column: str, scratch: Scratch) -> JsonLinesReader:
    """Open a file and find its columns in one pass. Raises OSError, and TableError if no line can be read."""
    with open_text(file, newline="\n"):
        pass  # raises OSError if the file cannot be opened, which `_read_lines` would report as a row
    columns = JsonColumns()
    error: str | None = None
    count = 0
    for row in _read_lines(file):
        columns.add(row.cells)
        error = error or row.error
        count += 1
    schema = columns.schema()
    if error and not schema.names:
        raise TableError(f"{file.name} cannot be read: {error}")
    return JsonLinesReader(file, schema, {}, count)


@dataclass(frozen=True, slots=True)
class JsonLinesReader(Reader):
    """Reads the first `count` rows of a JSON Lines file. Rows appended later are read by the next run."""

    count: int

    def rows(self) -> Iterator[RawRow]:
        columns = frozenset(self.schema.names)
        for row in islice(_read_lines(self.file), self.count):
            yield row if row.error else check_row(row, f"line {row.line}", columns)


def _read_lines(file: TableFile) -> Iterator[RawRow]:
    row_number, is_batch = 0, None
    try:
        with open_text(file, newline="\n") as stream:
            lines = LineReader(stream)
            while True:
                try:
                    text = next(lines)
                    if text.isspace():
                        continue
                    cells, error = _parse_object(text), None
                    is_batch = _is_batch_request(cells) if is_batch is None else is_batch
                    if is_batch:
                        cells, error = _read_batch_request(cells)
                except StopIteration:
                    return
                except RowError as exc:
                    cells, error = {}, f"line {lines.number} {exc}"
                yield RawRow(row_number, cells, error, lines.number)
                row_number += 1
    except OSError as exc:
        yield broken_off_row(file, row_number, exc)


def _parse_object(text: str) -> dict[str, Any]:
    if not is_utf8(text):
        raise RowError("is not UTF-8")
    try:
        value = json.loads(text.rstrip(), parse_float=exact_float)
    except json.JSONDecodeError as error:
        raise RowError(f"is not JSON: {error.msg.removesuffix(' at')}, character {error.pos + 1}") from error
    except ValueError as error:  # a number with thousands of digits
        raise RowError("is not JSON that can be read: a number in it is too long") from error
    except RecursionError as error:
        raise RowError("is nested too deeply") from error
    if not isinstance(value, dict):
        raise RowError(f"is not a JSON object but {type(value).__name__}")
    return value


def _is_batch_request(line: dict[str, Any]) -> bool:
    return "custom_id" in line and isinstance(line.get("body"), dict)


def _read_batch_request(line: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a request's cells under our column names, and an error message if its size is invalid."""
    if not _is_batch_request(line):
        raise RowError("has no custom_id and body, as the first line has")
    cells = {name: value for name, value in line.items() if name not in ("custom_id", "body")}
    body = dict(line["body"])
    count, size = body.pop("n", None), body.pop("size", None)
    if count is not None:
        cells["num_images_per_prompt"] = count
    error = None
    if size not in (None, "", "auto"):
        if isinstance(size, str) and (sides := SIZE.fullmatch(size.strip())):
            cells["width"], cells["height"] = int(sides[1]), int(sides[2])
        else:
            error = f"size {str(size)[:40]!r} is not WIDTHxHEIGHT"
    return {**cells, **body, "id": line["custom_id"]}, error


def exact_float(text: str) -> float | int | Decimal | JsonNumber:
    """Parse a JSON number with a point or an exponent without rounding, to a float if possible.

    A float is exact if it prints as the same number, as 0.1 does. A number with an exponent beyond Decimal stays text.
    """
    value = float(text)
    is_plain = "e" not in text.lower()
    if repr(value) == text or (is_plain and len(text) <= FLOAT_DIGITS):
        return value
    try:
        exact = Decimal(text)
    except InvalidOperation:
        return JsonNumber(text)
    if Decimal(repr(value)) == exact:
        return value
    is_short = is_plain and exact.adjusted() < MAX_INTEGER_DIGITS
    return int(exact) if is_short and exact == exact.to_integral_value() else exact
