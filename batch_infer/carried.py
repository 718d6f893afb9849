"""Values of carried columns: exact through Python and back, of a common type where files differ, else as exact text.

Between reading and writing, a cell is a plain Python value: dates, times and durations are their integers, and
extension types are their storage values. So years beyond 9999 and nanoseconds, which Python's own types do not hold,
are carried unchanged.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
from pyarrow import types

Convert = Callable[[Any], Any]


@lru_cache(maxsize=4096)
def result_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that a column of type `kind` has in results: the same without dictionaries and views.

    Types that Arrow cannot build from plain values become their storage type, or text.
    """
    if types.is_string(kind) or types.is_null(kind) or types.is_primitive(kind) and not types.is_temporal(kind):
        return kind  # without a trial: an array of Python values imports pandas, which takes a third of a second
    candidate = kind if isinstance(kind, pa.BaseExtensionType) else _map_leaves(kind, _result_leaf)
    try:
        plain = _plain_type(candidate)
        _cast(pa.nulls(1, candidate), plain)
        _from_plain(pa.nulls(1, plain), candidate)
        pa.array([None], candidate).take(pa.array([0]))
    except (NotImplementedError, ValueError, TypeError):  # Arrow's own errors are subclasses of these
        return result_type(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else pa.string()
    return candidate


def to_result_array(array: pa.Array) -> pa.Array:
    """Cast an array to its result type. An array whose result type is text only as a last resort is unchanged."""
    kind = result_type(array.type)
    return array if types.is_string(kind) and not _is_text(array.type) else _cast(array, kind)


def to_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the plain Python values of an array. Raises ValueError (UnicodeDecodeError) for text that is not UTF-8."""
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in to_values(chunk)]
    if isinstance(array, pa.DictionaryArray):  # convert each word once, however often it occurs
        used = array.indices.unique().drop_null()
        words = dict(zip(used.to_pylist(), to_values(array.dictionary.take(used)), strict=True))
        return [words.get(index) for index in array.indices.to_pylist()]
    kind = result_type(array.type)
    if types.is_string(kind) and not _is_text(array.type):
        return [str(value) if value.is_valid else None for value in array]
    return list(_cast(_cast(array, kind), _plain_type(kind)).to_pylist())


def to_array(values: Iterable[Any], kind: pa.DataType) -> pa.Array:
    """Return an array of a result type from plain values, or from Python's own types such as datetime."""
    values = list(values)
    try:
        return _from_plain(pa.array(values, _plain_type(kind)), kind)
    except (ValueError, TypeError):
        return pa.array(values, kind)


def make_python_reader(kind: pa.DataType) -> Convert | None:
    """Return a function from plain values to Python's own types such as datetime, or None where they are the same."""
    result = result_type(kind)
    if _plain_type(result) == result:
        return None

    def read(value: Any) -> Any:
        try:
            return to_array([value], result)[0].as_py()
        except (ValueError, OverflowError):  # beyond the range of Python's type
            return to_text(value, result)

    return read


def to_python_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the values of an array as Python's own types such as datetime, or as text where Python has no type."""
    kind = result_type(array.type)
    if "time64[ns]" not in str(kind):  # Python's type would lose the nanoseconds
        try:
            return list(array.to_pylist())
        except (ValueError, OverflowError):
            pass
    return [_to_json_value(value, kind) for value in to_values(array)]


def estimate_bytes(values: Iterable[Any]) -> int:
    """Return about how many bytes plain values take."""
    total = 0
    for value in values:
        kind = value.__class__
        if kind is str or kind is bytes:
            total += len(value)
        elif kind is list or kind is tuple:
            total += estimate_bytes(value)
        elif kind is dict:
            total += estimate_bytes(value) + estimate_bytes(value.keys())
        else:
            total += 8
    return total


@dataclass(frozen=True, slots=True)
class JsonNumber:
    """A number that no Python type can hold, as JSON text."""

    text: str

    def __str__(self) -> str:
        return self.text


def to_text(value: Any, kind: pa.DataType | None = None) -> str:
    """Return a plain value of type `kind` as exact text: bytes in base64, lists and structs in JSON."""
    value = _to_json_value(value, kind)
    if isinstance(value, (bool, list, dict)):
        return _json_text(value)
    return repr(value) if isinstance(value, float) else str(value)


def _json_text(value: Any) -> str:
    """Return JSON in which each number has all its digits. json.dumps cannot write a Decimal as a number."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        pass
    if isinstance(value, dict):
        members = (f"{json.dumps(key, ensure_ascii=False)}: {_json_text(item)}" for key, item in value.items())
        return f"{{{', '.join(members)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_json_text, value))}]"
    is_number = isinstance(value, (Decimal, JsonNumber))
    return str(value) if is_number else json.dumps(str(value), ensure_ascii=False)


def _to_json_value(value: Any, kind: pa.DataType | None = None) -> Any:
    """Replace whatever JSON has no type for by text."""
    if isinstance(value, (Decimal, JsonNumber)):
        return str(value)
    if value is None or kind is None:
        return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else value
    if isinstance(kind, pa.BaseExtensionType):
        return _EXTENSIONS.get(kind.extension_name, partial(_to_json_value, kind=kind.storage_type))(value)
    if types.is_temporal(kind):
        return _moment_text(value, kind)
    if types.is_map(kind):
        return [[_to_json_value(key, kind.key_type), _to_json_value(item, kind.item_type)] for key, item in value]
    if types.is_struct(kind):
        return {field.name: _to_json_value(value[field.name], field.type) for field in kind}
    if types.is_nested(kind):
        return [_to_json_value(item, kind.value_type) for item in value]
    return _to_json_value(value)


_EXTENSIONS: dict[str, Convert] = {
    "arrow.bool8": bool,
    "arrow.uuid": lambda value: str(uuid.UUID(bytes=value)),
}
"""Extension types whose values differ from their storage values."""


def _moment_text(value: int, kind: pa.DataType) -> str:
    """Return the text of a date, time or duration given as its integer. Timestamps with a time zone are in UTC."""
    if types.is_duration(kind):
        return f"{value} {kind.unit}"
    has_zone = types.is_timestamp(kind) and kind.tz is not None
    naive = pa.timestamp(kind.unit) if has_zone else kind
    text = str(to_array([value], naive).cast(pa.string())[0].as_py())
    if text.startswith("<"):  # beyond the years of Arrow's calendar
        unit = "days" if types.is_date32(kind) else "ms" if types.is_date64(kind) else kind.unit
        text = f"{value} {unit} since 1970-01-01 00:00:00"
    return f"{text}Z" if has_zone else text


def common_type(kinds: Collection[pa.DataType], arrays: Callable[[], Iterable[pa.Array]] | None = None) -> pa.DataType:
    """Return a type that holds every value of all these result types: text where no closer type does.

    Whether 64-bit integers and floats share a type depends on the values, which `arrays` returns where they are known.
    """
    distinct = set(kinds) - {pa.null()}
    if len(distinct) < 2:
        return next(iter(distinct), pa.null())
    if all(map(types.is_unsigned_integer, distinct)):
        return pa.uint64()
    if all(map(types.is_floating, distinct)):
        return pa.float64()
    if all(map(_is_bytes, distinct)):
        return pa.large_binary() if pa.large_binary() in distinct else pa.binary()
    if not all(types.is_integer(kind) or types.is_floating(kind) for kind in distinct):
        return pa.string()
    if not any(map(types.is_floating, distinct)) and pa.uint64() not in distinct:
        return pa.int64()
    if not distinct & {pa.int64(), pa.uint64()}:
        return pa.float64()
    return _lossless_type(arrays()) if arrays else pa.string()


def _lossless_type(arrays: Iterable[pa.Array]) -> pa.DataType:
    """Return int64 or float64, whichever holds all these numbers exactly, else text."""
    candidates = [pa.int64(), pa.float64()]
    for array in arrays:
        candidates = [kind for kind in candidates if _is_lossless(array, kind)]
    return candidates[0] if candidates else pa.string()


def _is_lossless(array: pa.Array, kind: pa.DataType) -> bool:
    try:
        array.cast(kind)  # raises rather than round
    except pa.ArrowInvalid:
        return False
    return True


def make_converter(source: pa.DataType, target: pa.DataType) -> Convert | None:
    """Return a function from plain values of one type to those of a common type, or None where they are the same."""
    if types.is_string(target):
        return partial(to_text, kind=None if types.is_string(source) else source)
    if types.is_float64(target):  # a JSON column of floats has integers too
        return float
    return int if types.is_integer(target) and types.is_floating(source) else None


def make_result_names(names: Iterable[str], reserved: Collection[str], *, known: bool = False) -> dict[str, str]:
    """Return a result name for each name, such that none differs from another or from `reserved` by case alone.

    SQL engines ignore case. A name in conflict becomes `input_<name>`, repeated until it is free. With `known`,
    `input_<name>` among `names` is the same column under its earlier result name, and the two share it.
    """
    spelled = dict.fromkeys(names)
    lowered = {name.lower() for name in reserved}
    result = {}
    for name in spelled:
        new = name
        while new.lower() in lowered or (new != name and new in spelled):
            new = f"input_{new}"
            if known and new in spelled:
                break
        lowered.add(new.lower())
        result[name] = new
    return result


def _map_leaves(kind: pa.DataType, convert: Convert) -> pa.DataType:
    """Apply `convert` to each type within a type that is not itself nested."""
    if isinstance(kind, pa.BaseExtensionType):
        return _map_leaves(kind.storage_type, convert)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _map_leaves(kind.value_type, convert)
    if types.is_map(kind):
        key, item = (field.with_type(_map_leaves(field.type, convert)) for field in (kind.key_field, kind.item_field))
        return pa.map_(key, item, kind.keys_sorted)
    if types.is_struct(kind):
        return pa.struct([field.with_type(_map_leaves(field.type, convert)) for field in kind])
    if not types.is_nested(kind) or types.is_union(kind):
        return convert(kind)
    field = kind.value_field.with_type(_map_leaves(kind.value_type, convert))
    if types.is_fixed_size_list(kind):
        return pa.list_(field, kind.list_size)
    return pa.large_list(field) if types.is_large_list(kind) or types.is_large_list_view(kind) else pa.list_(field)


def _result_leaf(kind: pa.DataType) -> pa.DataType:
    if _is_text(kind):
        return pa.string()
    return pa.binary() if types.is_binary_view(kind) else kind


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of the plain values of a result type."""
    return _map_leaves(kind, _plain_leaf)


def _plain_leaf(kind: pa.DataType) -> pa.DataType:
    if types.is_date32(kind) or types.is_time32(kind):
        return pa.int32()
    if types.is_temporal(kind) and not types.is_interval(kind):
        return pa.int64()
    return pa.float32() if types.is_float16(kind) else kind


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type == kind:
        return array
    return (array.storage if isinstance(array, pa.ExtensionArray) else array).cast(kind)


def _from_plain(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _from_plain(array, kind.storage_type))
    return array if array.type == kind else array.cast(kind)


def _is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view))


def _is_bytes(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary))
