"""Parse and validate the cells of fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from batch_infer.errors import RowError
from batch_infer.records import SizeRules
from batch_infer.settings import FIELDS
from batch_infer.table.base import replace_surrogates

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_IMAGES = 1000
MAX_TEXT_LENGTH = 10_000
"""Maximum number of characters in a prompt, negative prompt or id. A text encoder reads about 75 tokens, and tokenizing
a megabyte delays all other rows by seconds."""
NUMERIC_FIELDS = frozenset(FIELDS) - {"prompt", "id", "negative_prompt"}
MISSING_VALUES = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "null", "none", r"\n"})
"""Texts that databases, spreadsheets and pandas write for a missing number, in lower case."""


def format_id(value: Any) -> str:
    """Return an id cell as text."""
    if isinstance(value, float) and value.is_integer():  # pandas stores integers as floats if a cell is empty
        value = int(value)
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def read_fields(columns: Mapping[str, str], get: Callable[[str], Any]) -> dict[str, Any]:
    """Return a row's cells by field, with None for empty cells. `columns` maps fields to columns."""
    fields = {}
    for field, column in columns.items():
        value = get(column)
        fields[field] = None if value is None or _is_empty(field, value) else value
    return fields


def _is_empty(field: str, value: Any) -> bool:
    """Return whether a cell is NaN, an empty text, empty bytes, or in a numeric field one of MISSING_VALUES."""
    if value.__class__ is str and value and field in NUMERIC_FIELDS:
        return not value[0].isdigit() and value.strip().lower() in MISSING_VALUES
    return value in ("", b"") or (isinstance(value, float) and math.isnan(value))


def _parse_text(field: str, value: Any, sizes: SizeRules) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(f"{field} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not isinstance(value, str):
        raise RowError(f"{field} {format_value(value)} is not text but {type(value).__name__}")
    if "\0" in value:
        raise RowError(f"{field} contains a NUL byte")
    if field == "prompt" and not value.strip():
        raise RowError("the prompt is empty")
    return value


def parse_integer(field: str, value: Any, minimum: int, maximum: int) -> int:
    """Return a cell as a whole number within these bounds. Raises RowError."""
    if value.__class__ is str and value.isdecimal() and value.isascii() and len(value) < 20:
        number = int(value)  # ten times as fast as Decimal, and sufficient for nearly all cells
        if minimum <= number <= maximum:
            return number
    decimal = _to_decimal(value)
    # Compare before converting, since a short cell with an exponent of millions is a huge integer.
    if decimal is None or (-(10**30) < decimal < 10**30 and decimal != decimal.to_integral_value()):
        raise RowError(f"{field} {format_value(value)} is not a whole number")
    if not minimum <= decimal <= maximum:
        raise RowError(f"{field} {format_value(value)} is not within {minimum} to {maximum}")
    return int(decimal)


def _parse_side(field: str, value: Any, sizes: SizeRules) -> int:
    side = parse_integer(field, value, sizes.min_side, sizes.max_side)
    if side % sizes.side_multiple:
        nearest = max(sizes.min_side, round(side / sizes.side_multiple) * sizes.side_multiple)
        raise RowError(f"{field} {side} is not a multiple of {sizes.side_multiple}; the nearest is {nearest}")
    return side


def _parse_float(field: str, value: Any, maximum: float) -> float:
    number = _to_decimal(value)
    if number is None:
        raise RowError(f"{field} {format_value(value)} is not a number")
    if not 0 <= number <= Decimal(maximum):
        raise RowError(f"{field} {format_value(value)} is not within 0 to {maximum:g}")
    return float(number)


def _to_decimal(value: Any) -> Decimal | None:
    """Return a cell as a finite number, or None. A boolean is not a number."""
    if isinstance(value, str):
        return _parse_cached(value.strip()) if len(value) < 20 else _parse_decimal(value.strip())
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    return _parse_decimal(value)


def _parse_decimal(value: str | int | float | Decimal) -> Decimal | None:
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


_parse_cached = lru_cache(maxsize=4096)(_parse_decimal)
"""Parses short texts with a cache, since tables repeat the same numbers."""


def format_value(value: Any, max_length: int = 40) -> str:
    """Return a value in quotes for a message, truncated to `max_length` characters."""
    text = replace_surrogates(str(value))
    return repr(text if len(text) <= max_length else text[: max_length - 3] + "...")


PARSERS: Mapping[str, Callable[[str, Any, SizeRules], Any]] = {
    "prompt": _parse_text,
    "negative_prompt": _parse_text,
    "seed": lambda field, value, sizes: parse_integer(field, value, 0, MAX_SEED),
    "num_images_per_prompt": lambda field, value, sizes: parse_integer(field, value, 1, MAX_IMAGES),
    "height": _parse_side,
    "width": _parse_side,
    "num_inference_steps": lambda field, value, sizes: parse_integer(field, value, 1, MAX_STEPS),
    "guidance_scale": lambda field, value, sizes: _parse_float(field, value, MAX_GUIDANCE),
    "guidance_rescale": lambda field, value, sizes: _parse_float(field, value, 1.0),
}
"""Parsers by field. Do not change their order, since messages and fingerprints depend on it."""
