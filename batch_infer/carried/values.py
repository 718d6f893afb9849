"""Convert Arrow arrays to plain values and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from pyarrow import types

from batch_infer.carried.result_types import cast, from_plain, is_text, to_plain_type, to_result_type


def to_result_array(array: pa.Array) -> pa.Array:
    """Cast an array to its result type. Return it unchanged if its result type is text but its own type is not."""
    dtype = to_result_type(array.type)
    return array if types.is_string(dtype) and not is_text(array.type) else cast(array, dtype)


def to_values(array: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the plain values of an array. Raises ValueError for text that is not UTF-8."""
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in to_values(chunk)]
    if isinstance(array, pa.DictionaryArray):  # convert each distinct value only once
        indices = array.indices.unique().drop_null()
        values = dict(zip(indices.to_pylist(), to_values(array.dictionary.take(indices)), strict=True))
        return [values.get(index) for index in array.indices.to_pylist()]
    dtype = to_result_type(array.type)
    if types.is_string(dtype) and not is_text(array.type):
        return [str(value) if value.is_valid else None for value in array]
    return list(cast(cast(array, dtype), to_plain_type(dtype)).to_pylist())


def to_array(values: Iterable[Any], dtype: pa.DataType) -> pa.Array:
    """Return an array of a result type from plain values or from values of Python's own types such as datetime."""
    values = list(values)
    try:
        return from_plain(pa.array(values, to_plain_type(dtype)), dtype)
    except (ValueError, TypeError):
        return pa.array(values, dtype)


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
