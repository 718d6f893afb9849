"""Read JSON Lines with one object per line, and OpenAI batch files, whose lines contain `custom_id` and `body`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from itertools import islice
from typing import Any

import pyarrow as pa

from batch_infer.carried import JsonNumber
from batch_infer.errors import RowError, TableError
from batch_infer.table.base import MAX_COLUMNS, RawRow, Reader, Scratch, TableFile, is_utf8, replace_surrogates
from batch_infer.table.streams import open_text, read_lines

MAX_DEPTH = 100
SIZE = re.compile("([0-9]{1,9})[xX]([0-9]{1,9})")
"""Matches a `size` of WIDTHxHEIGHT: https://platform.openai.com/docs/api-reference/images/create."""
FLOAT_DIGITS = 15
"""Maximum number of decimal digits that always survive conversion to float and back (IEEE 754 binary64)."""
MAX_INTEGER_DIGITS = 4000
"""Maximum digits before the point of a number such as 12.0 that becomes an integer. Python's own limit is 4300."""

_NULL, _BOOL, _INTEGER, _FLOAT, _TEXT, _INEXACT = 0, 1, 2, 4, 8, 16
"""Bit flags for the values in a column. _INEXACT marks an integer that float64 cannot represent exactly."""
_FLAGS = {type(None): _NULL, bool: _BOOL, float: _FLOAT, str: _TEXT, list: _TEXT, dict: _TEXT}
_TYPES = {
    _NULL: pa.null(),
    _BOOL: pa.bool_(),
    _INTEGER: pa.int64(),
    _INTEGER | _INEXACT: pa.int64(),
    _FLOAT: pa.float64(),
    _INTEGER | _FLOAT: pa.float64(),
}


def open_jsonl(file: TableFile, prompt_column: str, scratch: Scratch) -> Reader:
    """Open a file and find its columns in one pass.

    Raises OSError, StorageError, and TableError for UTF-16 or if no line can be read.
    """
    with open_text(file, newline="\n"):
        pass  # raises OSError if the file cannot be opened; `Reader.read_rows` would turn the error into a row
    return open_objects(file, lambda: _read_objects(file))


def open_objects(
    file: TableFile,
    read: Callable[[], Iterator[RawRow]],
    columns: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> Reader:
    """Read all rows once to find their columns and types, and return a reader of these rows.

    `columns` exist even if no row has them. Rows that are appended to the file later are left to the next run. Raises
    TableError if no row can be read, StorageError if the disk fails.
    """
    flags: dict[str, int] = dict.fromkeys(columns, _NULL)
    error: str | None = None
    is_readable, count = False, 0
    for row in Reader(file, pa.schema([]), {}, read).read_rows():
        _add_flags(row.cells, flags)
        error = error or row.error
        is_readable = is_readable or bool(row.cells) or not row.error
        count += 1
    if error and not (flags and is_readable):
        raise TableError(f"{file.name} cannot be read: {error}")
    schema = pa.schema([(name, _TYPES.get(flag, pa.string())) for name, flag in flags.items()])
    names = frozenset(flags)
    return Reader(file, schema, renamed or {}, lambda: (_check_row(row, names) for row in islice(read(), count)))


def _add_flags(cells: Mapping[str, Any], columns: dict[str, int]) -> None:
    """Add the flags of a row's values to `columns`.

    Skip names that are not UTF-8 or exceed MAX_COLUMNS. `_check_row` rejects their rows.
    """
    for name, value in cells.items():
        flags = _FLAGS.get(value.__class__)
        if flags is None:  # int, Decimal or JsonNumber
            is_int64 = value.__class__ is int and -(2**63) <= value < 2**63
            flags = _TEXT if not is_int64 else _INTEGER if int(float(value)) == value else _INTEGER | _INEXACT
        if name in columns:
            columns[name] |= flags
        elif len(columns) < MAX_COLUMNS and is_utf8(name):
            columns[name] = flags


def _check_row(row: RawRow, columns: frozenset[str]) -> RawRow:
    """Return the row, or a row with an error if it does not fit the table."""
    if row.error:
        return row
    if not columns.issuperset(row.cells):
        unknown = replace_surrogates(next(name for name in row.cells if name not in columns))
        error = (
            f"has an unsupported column {unknown[:40]!r}: "
            f"its name is not UTF-8, or the table already has {MAX_COLUMNS} columns"
        )
    elif deep := [name for name, value in row.cells.items() if value.__class__ in (list, dict) and is_too_deep(value)]:
        error = f"is nested too deeply, in {deep[0]!r}"
    else:
        return row
    location = f"line {row.line}" if row.line else f"element {row.number}"
    return row._replace(cells={}, error=f"{location} {error}")


def is_too_deep(value: Any) -> bool:
    """Return whether a list or object has more than MAX_DEPTH levels, too many for recursive code."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if outer.__class__ is dict else outer)
            if inner.__class__ in (list, dict)
        ]
        if not level:
            return False
    return True


def _read_objects(file: TableFile) -> Iterator[RawRow]:
    is_batch = None
    with open_text(file, newline="\n") as stream:
        for row_number, (line, text, error) in enumerate(read_lines(stream)):
            cells: dict[str, Any] = {}
            if error is None:
                try:
                    cells = _parse_object(text)
                    is_batch = _is_batch_request(cells) if is_batch is None else is_batch
                    if is_batch:
                        cells, error = _read_batch_request(cells)
                except RowError as exc:
                    cells, error = {}, f"line {line} {exc}"
            yield RawRow(row_number, cells, error, line)


def _parse_object(text: str) -> dict[str, Any]:
    if not is_utf8(text):
        raise RowError("is not UTF-8")
    try:
        value = json.loads(text.rstrip(), parse_float=parse_exact_float)
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
    """Return the cells of a batch request by column name, and an error message if its `size` is invalid."""
    if not {"custom_id", "body"} <= line.keys():
        raise RowError("has no custom_id and body, unlike the first line")
    if not isinstance(line["body"], dict):
        raise RowError(f"has a body that is not a JSON object but {type(line['body']).__name__}")
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


def parse_exact_float(text: str) -> float | int | Decimal | JsonNumber:
    """Parse a JSON number that has a decimal point or an exponent, without rounding it.

    Return a float if it prints as the same number, like 0.1. Otherwise, return an int for a whole number without an
    exponent, or a Decimal. A number whose exponent is too large for Decimal becomes a JsonNumber.
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
