"""Find one type and one name for the columns of several tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial

import pyarrow as pa
from pyarrow import types

from batch_infer.carried.text import Convert, to_text


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
