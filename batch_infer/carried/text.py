"""Convert plain values to text, to JSON types, and to Python's own types such as datetime."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow import types

from batch_infer.carried.result_types import to_plain_type, to_result_type
from batch_infer.carried.values import to_array, to_values

Convert = Callable[[Any], Any]
NO_PYTHON_VALUE = (ValueError, OverflowError, KeyError)
"""Errors of Arrow for a value beyond the range or precision of Python's type. KeyError is an unknown zone of pytz."""


@dataclass(frozen=True, slots=True)
class JsonNumber:
    """The JSON text of a number whose exponent is out of Decimal's range."""

    text: str

    def __str__(self) -> str:
        return self.text


def to_text(value: Any, dtype: pa.DataType | None = None) -> str:
    """Return a plain value of type `dtype` as exact text: bytes in base64, and booleans and nested values as JSON."""
    value = _to_json_value(value, dtype)
    if isinstance(value, (bool, list, dict)):
        return _format_json(value)
    return repr(value) if isinstance(value, float) else str(value)


def _format_json(value: Any) -> str:
    """Return JSON with all digits of every number. json.dumps cannot write a Decimal as a number."""
    with suppress(TypeError):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        members = (f"{json.dumps(key, ensure_ascii=False)}: {_format_json(item)}" for key, item in value.items())
        return f"{{{', '.join(members)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_format_json, value))}]"
    is_number = isinstance(value, (Decimal, JsonNumber))
    return str(value) if is_number else json.dumps(str(value), ensure_ascii=False)


def _to_json_value(value: Any, dtype: pa.DataType | None = None) -> Any:
    """Convert a plain value of type `dtype` and the values in it to JSON types.

    Decimals, bytes, UUIDs and temporal values become text, and maps become lists of pairs. Without `dtype`, values in a
    list or dict are not converted.
    """
    if isinstance(value, (Decimal, JsonNumber)):
        return str(value)
    if value is None or dtype is None:
        return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else value
    if isinstance(dtype, pa.BaseExtensionType):
        return _EXTENSIONS.get(dtype.extension_name, partial(_to_json_value, dtype=dtype.storage_type))(value)
    if types.is_temporal(dtype):
        return _format_temporal(value, dtype)
    if types.is_map(dtype):
        return [[_to_json_value(key, dtype.key_type), _to_json_value(item, dtype.item_type)] for key, item in value]
    if types.is_struct(dtype):
        return {field.name: _to_json_value(value[field.name], field.type) for field in dtype}
    if types.is_nested(dtype):
        return [_to_json_value(item, dtype.value_type) for item in value]
    return _to_json_value(value)


_EXTENSIONS: dict[str, Convert] = {"arrow.bool8": bool, "arrow.uuid": lambda value: str(uuid.UUID(bytes=value))}
"""Conversions of storage values to JSON types by extension name. Other values are converted like their storage type."""


def _format_temporal(value: int, dtype: pa.DataType) -> str:
    """Format the plain value of a date, time, timestamp or duration. A timestamp with a time zone is given in UTC."""
    if types.is_duration(dtype):
        return f"{value} {dtype.unit}"
    has_zone = types.is_timestamp(dtype) and dtype.tz is not None
    naive = pa.timestamp(dtype.unit) if has_zone else dtype
    text = str(to_array([value], naive).cast(pa.string())[0].as_py())
    if text.startswith("<"):  # `<value out of range: ...>`, beyond the years of Arrow's calendar
        unit = "days" if types.is_date32(dtype) else "ms" if types.is_date64(dtype) else dtype.unit
        text = f"{value} {unit} since 1970-01-01 00:00:00"
    return f"{text}Z" if has_zone else text


def make_python_reader(dtype: pa.DataType) -> Convert | None:
    """Return a function that converts a column's plain values to Python's own types such as datetime.

    A value that does not fit becomes text. Returns None if plain values of this type need no conversion.
    """
    result = to_result_type(dtype)
    if to_plain_type(result) == result:
        return None

    def read(value: Any) -> Any:
        try:
            return to_array([value], result)[0].as_py()
        except NO_PYTHON_VALUE:
            return to_text(value, result)

    return read


def to_python_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the values of an array in Python's own types such as datetime.

    If one of them may not fit, convert all as in `_to_json_value`.
    """
    dtype = to_result_type(array.type)
    if "time64[ns]" not in str(dtype):  # datetime.time would lose the nanoseconds
        with suppress(*NO_PYTHON_VALUE):
            return list(array.to_pylist())
    return [_to_json_value(value, dtype) for value in to_values(array)]
