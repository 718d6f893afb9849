"""Values of carried columns: exact through Python and back, of one type where files differ, else as exact text.

Between reading and writing, a cell is a plain Python value: dates, times and durations are their integers, and
extension types are what they are stored as. So years beyond 9999 and nanoseconds, which Python's own types do not hold,
are carried as they are.
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
    """The type that results have for a column of this type: without dictionaries and views, else the same."""
    if types.is_string(kind) or types.is_null(kind) or types.is_primitive(kind) and not types.is_temporal(kind):
        return kind  # not tried: an array of Python values imports pandas, which takes a third of a second
    found = _rebuilt(kind, _as_result)
    if isinstance(kind, pa.BaseExtensionType):
        found = kind
    try:
        plain = _plain_type(found)
        _cast(pa.nulls(1, found), plain)
        _from_plain(pa.nulls(1, plain), found)
        pa.array([None], found).take(pa.array([0]))
    except (NotImplementedError, ValueError, TypeError):  # Arrow's own errors are of these
        return result_type(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else pa.string()
    return found


def to_result_array(array: pa.Array) -> pa.Array:
    """An array as its result type, or as it is where that type is text for lack of a closer type."""
    kind = result_type(array.type)
    return array if types.is_string(kind) and not _is_text(array.type) else _cast(array, kind)


def to_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The plain Python values of an array. Raises ValueError, such as UnicodeDecodeError, for text that is none."""
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in to_values(chunk)]
    if isinstance(array, pa.DictionaryArray):  # each word once, however often it occurs
        used = array.indices.unique().drop_null()
        words = dict(zip(used.to_pylist(), to_values(array.dictionary.take(used)), strict=True))
        return [words.get(index) for index in array.indices.to_pylist()]
    kind = result_type(array.type)
    if types.is_string(kind) and not _is_text(array.type):
        return [str(value) if value.is_valid else None for value in array]
    return list(_cast(_cast(array, kind), _plain_type(kind)).to_pylist())


def to_array(values: Iterable[Any], kind: pa.DataType) -> pa.Array:
    """An array of a result type from plain Python values, or from Python's own, such as datetime."""
    values = list(values)
    try:
        return _from_plain(pa.array(values, _plain_type(kind)), kind)
    except (ValueError, TypeError):
        return pa.array(values, kind)


def make_python_reader(kind: pa.DataType) -> Convert | None:
    """How a plain value becomes Python's own, such as a datetime; None where it is that already."""
    found = result_type(kind)
    if _plain_type(found) == found:
        return None

    def read(value: Any) -> Any:
        try:
            return to_array([value], found)[0].as_py()
        except (ValueError, OverflowError):  # it has no such type
            return to_text(value, found)

    return read


def to_python_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of an array as Python's own, such as datetime; text for those that have none."""
    kind = result_type(array.type)
    if "time64[ns]" not in str(kind):  # of which Python would lose the nanoseconds
        try:
            return list(array.to_pylist())
        except (ValueError, OverflowError):
            pass
    return [readable(value, kind) for value in to_values(array)]


def estimate_bytes(values: Iterable[Any]) -> int:
    """About how many bytes plain values take."""
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


def to_text(value: Any, kind: pa.DataType | None = None) -> str:
    """A plain value of this type as text that says it exactly: bytes in base64, lists and structs in JSON.

    Without a type, that of the value counts.
    """
    found = readable(value, kind)
    if isinstance(found, (bool, list, dict)):
        return _json_text(found)
    return repr(found) if isinstance(found, float) else str(found)


@dataclass(frozen=True, slots=True)
class JsonNumber:
    """A number as JSON spells it, for one that no Python type can hold."""

    text: str

    def __str__(self) -> str:
        return self.text


def _json_text(value: Any) -> str:
    """JSON in which each number has all its digits. json.dumps has no way to write a Decimal as a number."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        pass
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key, ensure_ascii=False)}: {_json_text(value[key])}' for key in value)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_json_text, value))}]"
    is_number = isinstance(value, (Decimal, JsonNumber))
    return str(value) if is_number else json.dumps(str(value), ensure_ascii=False)


def readable(value: Any, kind: pa.DataType | None = None) -> Any:
    """A plain value with text for whatever JSON has no type for."""
    if isinstance(value, (Decimal, JsonNumber)):
        return str(value)
    if value is None or kind is None:
        return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else value
    if isinstance(kind, pa.BaseExtensionType):
        return _READABLE.get(kind.extension_name, partial(readable, kind=kind.storage_type))(value)
    if types.is_temporal(kind):
        return _moment(value, kind)
    if types.is_map(kind):
        return [[readable(key, kind.key_type), readable(item, kind.item_type)] for key, item in value]
    if types.is_struct(kind):
        return {field.name: readable(value[field.name], field.type) for field in kind}
    if types.is_nested(kind):
        return [readable(item, kind.value_type) for item in value]
    return readable(value)


def common_type(kinds: Collection[pa.DataType], arrays: Callable[[], Iterable[pa.Array]] | None = None) -> pa.DataType:
    """A type that holds every value of all these result types: text, where nothing closer does.

    Whether integers of 64 bits and floats fit into one type depends on the values: `arrays` gives them, where they
    can be looked at.
    """
    found = set(kinds) - {pa.null()}
    if len(found) < 2:
        return next(iter(found), pa.null())
    if all(map(types.is_unsigned_integer, found)):
        return pa.uint64()
    if all(map(types.is_floating, found)):
        return pa.float64()
    if all(map(_is_bytes, found)):
        return pa.large_binary() if pa.large_binary() in found else pa.binary()
    if not all(types.is_integer(kind) or types.is_floating(kind) for kind in found):
        return pa.string()
    if not any(map(types.is_floating, found)) and pa.uint64() not in found:
        return pa.int64()
    if not found & {pa.int64(), pa.uint64()}:
        return pa.float64()
    return _fitting(arrays()) if arrays else pa.string()


def make_converter(source: pa.DataType, target: pa.DataType) -> Convert | None:
    """How a plain value of one type becomes one of a common type; None where it is one. Null stays null."""
    if types.is_string(target):
        return partial(to_text, kind=None if types.is_string(source) else source)
    if types.is_float64(target):  # a JSON column of floats has integers too
        return float
    return int if types.is_integer(target) and types.is_floating(source) else None


def make_result_names(names: Iterable[str], taken: Collection[str], *, known: bool = False) -> dict[str, str]:
    """A name for each of these that differs from all others and those taken by more than case, as SQL engines compare.

    One that would not is called input_<name>. That name is its own even if another column has it already; with `known`
    it is that column's earlier name, and they share it.
    """
    spelled = dict.fromkeys(names)
    lowered = {name.lower() for name in taken}
    found = {}
    for name in spelled:
        new = name
        while new.lower() in lowered or (new != name and new in spelled):
            new = f"input_{new}"
            if known and new in spelled:
                break
        lowered.add(new.lower())
        found[name] = new
    return found


def _fitting(arrays: Iterable[pa.Array]) -> pa.DataType:
    """int64 or float64, whichever holds all these numbers as they are; else text."""
    fitting = [pa.int64(), pa.float64()]
    for array in arrays:
        fitting = [kind for kind in fitting if _fits(array, kind)]
    return fitting[0] if fitting else pa.string()


def _fits(array: pa.Array, kind: pa.DataType) -> bool:
    if array.type == kind:
        return True
    try:
        array.cast(kind)  # which refuses to round
    except pa.ArrowInvalid:
        return False
    return True


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return _rebuilt(kind, _as_plain)


def _rebuilt(kind: pa.DataType, leaf: Convert) -> pa.DataType:
    """Replace each type within a type that is not itself nested."""
    if isinstance(kind, pa.BaseExtensionType):
        return _rebuilt(kind.storage_type, leaf)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _rebuilt(kind.value_type, leaf)
    if types.is_map(kind):
        key, item = (field.with_type(_rebuilt(field.type, leaf)) for field in (kind.key_field, kind.item_field))
        return pa.map_(key, item, kind.keys_sorted)
    if types.is_struct(kind):
        return pa.struct([field.with_type(_rebuilt(field.type, leaf)) for field in kind])
    if not types.is_nested(kind) or types.is_union(kind):
        return leaf(kind)
    field = kind.value_field.with_type(_rebuilt(kind.value_type, leaf))
    if types.is_fixed_size_list(kind):
        return pa.list_(field, kind.list_size)
    return pa.large_list(field) if types.is_large_list(kind) or types.is_large_list_view(kind) else pa.list_(field)


def _as_result(kind: pa.DataType) -> pa.DataType:
    if _is_text(kind):
        return pa.string()
    return pa.binary() if types.is_binary_view(kind) else kind


def _as_plain(kind: pa.DataType) -> pa.DataType:
    if types.is_date32(kind) or types.is_time32(kind):
        return pa.int32()
    if types.is_temporal(kind) and not types.is_interval(kind):
        return pa.int64()
    if types.is_float16(kind):
        return pa.float32()
    return kind


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type == kind:
        return array
    return (array.storage if isinstance(array, pa.ExtensionArray) else array).cast(kind)


def _from_plain(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _from_plain(array, kind.storage_type))
    return array if array.type == kind else array.cast(kind)


def _is_text(kind: pa.DataType) -> bool:
    return any(of(kind) for of in (types.is_string, types.is_large_string, types.is_string_view))


def _is_bytes(kind: pa.DataType) -> bool:
    return any(of(kind) for of in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary))


def _moment(value: int, kind: pa.DataType) -> str:
    """A date, time or duration from its integer. A timestamp with a time zone is shown in UTC."""
    if types.is_duration(kind):
        return f"{value} {kind.unit}"
    zoned = types.is_timestamp(kind) and kind.tz is not None
    naive = pa.timestamp(kind.unit) if zoned else kind
    text = str(to_array([value], naive).cast(pa.string())[0].as_py())
    if text.startswith("<"):  # beyond the years that Arrow's calendar has
        unit = "days" if types.is_date32(kind) else "ms" if types.is_date64(kind) else kind.unit
        text = f"{value} {unit} since 1970-01-01 00:00:00"
    return f"{text}Z" if zoned else text


_READABLE: dict[str, Convert] = {
    "arrow.bool8": bool,
    "arrow.uuid": lambda value: str(uuid.UUID(bytes=value)),
}
"""How values of extension types read that do not read as what they are stored as."""
