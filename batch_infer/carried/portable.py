"""Convert columns to types that data loaders read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
from pyarrow import types

from batch_infer.carried.text import to_text
from batch_infer.carried.values import to_values


def rename_reserved(names: Sequence[str], reserved: Mapping[str, str]) -> list[str]:
    """Return column names in which those that `reserved` maps have new names, which no other column has."""
    kept = {name for name in names if reserved.get(name, name) == name}
    renamed: list[str] = []
    for name in names:
        new_name = reserved.get(name, name)
        while new_name in renamed or (new_name != name and new_name in kept):
            new_name = f"input_{new_name}"
        renamed.append(new_name)
    return renamed


def to_portable_type(dtype: pa.DataType) -> pa.DataType:
    """Return a type that Hugging Face's datasets reads, which is text for maps, extension types and dictionaries."""
    return dtype if _is_portable(dtype) else pa.string()


def _is_portable(dtype: pa.DataType) -> bool:
    if types.is_map(dtype) or types.is_dictionary(dtype) or isinstance(dtype, pa.BaseExtensionType):
        return False
    return all(_is_portable(dtype.field(position).type) for position in range(dtype.num_fields))


def to_portable(table: pa.Table) -> pa.Table:
    """Convert the columns of a table to portable types. Values of other types become exact text."""
    for position, field in enumerate(table.schema):
        portable = to_portable_type(field.type)
        if portable != field.type:
            values = to_values(table.column(position))
            texts = [None if value is None else to_text(value, field.type) for value in values]
            table = table.set_column(position, field.name, pa.array(texts, portable))
    return table
