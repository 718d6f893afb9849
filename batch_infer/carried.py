"""Carry column values from tables to results exactly, in a common type or as text.

Between reading and writing, a cell is a plain value: for example, an integer for a date, time, timestamp or duration,
and the storage value for an extension type. Plain values preserve years beyond 9999 and nanoseconds, unlike Python's
own types such as datetime.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
from pyarrow import types

Convert = Callable[[Any], Any]


@lru_cache(maxsize=4096)
def to_result_type(dtype: pa.DataType) -> pa.DataType:
    """Return the type that a column of type `dtype` has in the results.

    Dictionary, run-end encoded and view types are replaced by plain types. An extension type that Arrow cannot build
    from plain values becomes its storage type, and any other such type becomes text.
    """
    if types.is_string(dtype) or types.is_null(dtype) or types.is_primitive(dtype) and not types.is_temporal(dtype):
        return dtype  # return early: pa.array, used below, imports pandas, which takes a third of a second
    candidate = dtype if isinstance(dtype, pa.BaseExtensionType) else _convert_leaves(dtype, _to_result_leaf)
    try:
        plain = _to_plain_type(candidate)
        _cast(pa.nulls(1, candidate), plain)
        _from_plain(pa.nulls(1, plain), candidate)
        pa.array([None], candidate).take(pa.array([0]))
    except (NotImplementedError, ValueError, TypeError):  # or Arrow's subclasses of these
        return to_result_type(dtype.storage_type) if isinstance(dtype, pa.BaseExtensionType) else pa.string()
    return candidate


def to_result_array(array: pa.Array) -> pa.Array:
    """Cast an array to its result type. Return it unchanged if its result type is text but its own type is not."""
    dtype = to_result_type(array.type)
    return array if types.is_string(dtype) and not _is_text(array.type) else _cast(array, dtype)


def to_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the plain values of an array. Raises ValueError for text that is not UTF-8."""
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in to_values(chunk)]
    if isinstance(array, pa.DictionaryArray):  # convert each distinct value only once
        indices = array.indices.unique().drop_null()
        values = dict(zip(indices.to_pylist(), to_values(array.dictionary.take(indices)), strict=True))
        return [values.get(index) for index in array.indices.to_pylist()]
    dtype = to_result_type(array.type)
    if types.is_string(dtype) and not _is_text(array.type):
        return [str(value) if value.is_valid else None for value in array]
    return list(_cast(_cast(array, dtype), _to_plain_type(dtype)).to_pylist())


def to_array(values: Iterable[Any], dtype: pa.DataType) -> pa.Array:
    """Return an array of a result type from plain values or from values of Python's own types such as datetime."""
    values = list(values)
    try:
        return _from_plain(pa.array(values, _to_plain_type(dtype)), dtype)
    except (ValueError, TypeError):
        return pa.array(values, dtype)


def make_python_reader(dtype: pa.DataType) -> Convert | None:
    """Return a function that converts a column's plain values to Python's own types such as datetime.

    A value that does not fit becomes text. Returns None if plain values of this type need no conversion.
    """
    result = to_result_type(dtype)
    if _to_plain_type(result) == result:
        return None

    def read(value: Any) -> Any:
        try:
            return to_array([value], result)[0].as_py()
        except (ValueError, OverflowError):  # beyond the range or precision of Python's type
            return to_text(value, result)

    return read


def to_python_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the values of an array in Python's own types such as datetime.

    If one of them may not fit, convert all as in `_to_json_value`.
    """
    dtype = to_result_type(array.type)
    if "time64[ns]" not in str(dtype):  # datetime.time would lose the nanoseconds
        with suppress(ValueError, OverflowError):
            return list(array.to_pylist())
    return [_to_json_value(value, dtype) for value in to_values(array)]


def estimate_bytes(values: Iterable[Any]) -> int:
    """Estimate the size of plain values in bytes."""
    total = 0
    for value in values:
        cls = value.__class__
        if cls is str or cls is bytes:
            total += len(value)
        elif cls is list or cls is tuple:
            total += estimate_bytes(value)
        elif cls is dict:
            total += estimate_bytes(value.keys()) + estimate_bytes(value.values())
        else:
            total += 8
    return total


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


def find_common_type(dtypes: Iterable[pa.DataType], arrays: Iterable[pa.Array] | None = None) -> pa.DataType:
    """Return a type that can represent every value of these result types.

    Different types become a common integer, float or binary type if possible, and otherwise text. Whether 64-bit
    integers share a type with floats, or uint64 with signed integers, depends on the values in `arrays`, which are only
    read in these cases. Without `arrays`, the type is text in these cases.
    """
    distinct = set(dtypes) - {pa.null()}
    if len(distinct) < 2:
        return next(iter(distinct), pa.null())
    if all(map(types.is_unsigned_integer, distinct)):
        return pa.uint64()
    if all(map(types.is_floating, distinct)):
        return pa.float64()
    if all(dtype in (pa.binary(), pa.large_binary()) or types.is_fixed_size_binary(dtype) for dtype in distinct):
        return pa.large_binary() if pa.large_binary() in distinct else pa.binary()
    if not all(types.is_integer(dtype) or types.is_floating(dtype) for dtype in distinct):
        return pa.string()
    if not any(map(types.is_floating, distinct)) and pa.uint64() not in distinct:
        return pa.int64()
    if not distinct & {pa.int64(), pa.uint64()}:
        return pa.float64()
    return pa.string() if arrays is None else _find_lossless_type(arrays)


def _find_lossless_type(arrays: Iterable[pa.Array]) -> pa.DataType:
    """Return int64 if it represents all values exactly, else float64 if that does, else text."""
    candidates = [pa.int64(), pa.float64()]
    for array in arrays:
        for dtype in list(candidates):
            try:
                array.cast(dtype)  # raises an error instead of rounding
            except pa.ArrowInvalid:
                candidates.remove(dtype)
    return candidates[0] if candidates else pa.string()


def make_converter(source: pa.DataType, target: pa.DataType) -> Convert | None:
    """Return a function that converts plain values of a result type to a common type, or None if none is needed."""
    if types.is_string(target):
        return partial(to_text, dtype=None if types.is_string(source) else source)
    if types.is_float64(target):  # even if `source` is float64: a JSON column of floats may contain integers
        return float
    return int if types.is_integer(target) and types.is_floating(source) else None


def make_result_names(
    names: Iterable[str], reserved: Collection[str], *, reuse_prefixed: bool = False
) -> dict[str, str]:
    """Return a result name for each name. Ignoring case, no result name equals another or a name in `reserved`.

    Case is ignored because SQL engines ignore it. Conflicting names are prefixed with `input_` until they are unique.
    With `reuse_prefixed`, an `input_<name>` that precedes a conflicting `name` in `names` is taken to be its result
    name, and both have that result name.
    """
    distinct = dict.fromkeys(names)
    used = {name.lower() for name in reserved}
    result_names = {}
    for name in distinct:
        candidate = name
        while candidate.lower() in used or (candidate != name and candidate in distinct):
            candidate = f"input_{candidate}"
            if reuse_prefixed and candidate in distinct:
                break
        used.add(candidate.lower())
        result_names[name] = candidate
    return result_names


def convert_items(dtype: pa.DataType, convert: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Return a map, list or struct type with its item types converted. List views become lists."""
    if types.is_map(dtype):
        key, item = (field.with_type(convert(field.type)) for field in (dtype.key_field, dtype.item_field))
        return pa.map_(key, item, dtype.keys_sorted)
    if types.is_struct(dtype):
        return pa.struct([field.with_type(convert(field.type)) for field in dtype])
    field = dtype.value_field.with_type(convert(dtype.value_type))
    if types.is_fixed_size_list(dtype):
        return pa.list_(field, dtype.list_size)
    return pa.large_list(field) if types.is_large_list(dtype) or types.is_large_list_view(dtype) else pa.list_(field)


def _convert_leaves(dtype: pa.DataType, convert: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Return a type in which each innermost type is converted.

    Extension types become their storage type; dictionary and run-end encoded types become their value type.
    """
    if isinstance(dtype, pa.BaseExtensionType):
        return _convert_leaves(dtype.storage_type, convert)
    if types.is_dictionary(dtype) or types.is_run_end_encoded(dtype):
        return _convert_leaves(dtype.value_type, convert)
    if not types.is_nested(dtype) or types.is_union(dtype):
        return convert(dtype)
    return convert_items(dtype, lambda item: _convert_leaves(item, convert))


def _to_result_leaf(dtype: pa.DataType) -> pa.DataType:
    if _is_text(dtype):
        return pa.string()
    return pa.binary() if types.is_binary_view(dtype) else dtype


def _to_plain_type(dtype: pa.DataType) -> pa.DataType:
    """Return the type of the plain values of a result type."""
    return _convert_leaves(dtype, _to_plain_leaf)


def _to_plain_leaf(dtype: pa.DataType) -> pa.DataType:
    if types.is_date32(dtype) or types.is_time32(dtype):
        return pa.int32()
    if types.is_temporal(dtype) and not types.is_interval(dtype):
        return pa.int64()
    return pa.float32() if types.is_float16(dtype) else dtype


def _cast(array: pa.Array, dtype: pa.DataType) -> pa.Array:
    if array.type == dtype:
        return array
    return (array.storage if isinstance(array, pa.ExtensionArray) else array).cast(dtype)


def _from_plain(array: pa.Array, dtype: pa.DataType) -> pa.Array:
    if isinstance(dtype, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(dtype, _from_plain(array, dtype.storage_type))
    return array if array.type == dtype else array.cast(dtype)


def _is_text(dtype: pa.DataType) -> bool:
    return any(test(dtype) for test in (types.is_string, types.is_large_string, types.is_string_view))
