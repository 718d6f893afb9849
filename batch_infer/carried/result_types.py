"""Choose the type that a column has in the results, and the type of its plain values."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pyarrow as pa
from pyarrow import types


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
        plain = to_plain_type(candidate)
        cast(pa.nulls(1, candidate), plain)
        from_plain(pa.nulls(1, plain), candidate)
        pa.array([None], candidate).take(pa.array([0]))
    except (NotImplementedError, ValueError, TypeError):  # or Arrow's subclasses of these
        return to_result_type(dtype.storage_type) if isinstance(dtype, pa.BaseExtensionType) else pa.string()
    return candidate


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
    if is_text(dtype):
        return pa.string()
    return pa.binary() if types.is_binary_view(dtype) else dtype


def to_plain_type(dtype: pa.DataType) -> pa.DataType:
    """Return the type of the plain values of a result type."""
    return _convert_leaves(dtype, _to_plain_leaf)


def _to_plain_leaf(dtype: pa.DataType) -> pa.DataType:
    if types.is_date32(dtype) or types.is_time32(dtype):
        return pa.int32()
    if types.is_temporal(dtype) and not types.is_interval(dtype):
        return pa.int64()
    return pa.float32() if types.is_float16(dtype) else dtype


def cast(array: pa.Array, dtype: pa.DataType) -> pa.Array:
    """Cast an array, or the storage of an extension array."""
    if array.type == dtype:
        return array
    return (array.storage if isinstance(array, pa.ExtensionArray) else array).cast(dtype)


def from_plain(array: pa.Array, dtype: pa.DataType) -> pa.Array:
    """Cast an array of plain values to a result type."""
    if isinstance(dtype, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(dtype, from_plain(array, dtype.storage_type))
    return array if array.type == dtype else array.cast(dtype)


def is_text(dtype: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's types of text."""
    return any(test(dtype) for test in (types.is_string, types.is_large_string, types.is_string_view))
