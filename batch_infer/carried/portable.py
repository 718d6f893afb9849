"""Convert columns to types that data loaders read."""

from __future__ import annotations

import pyarrow as pa

from batch_infer.carried.text import to_text
from batch_infer.carried.values import to_values


def to_portable_type(dtype: pa.DataType) -> pa.DataType:
    """Return a type that Hugging Face's datasets reads, which is text for maps, extension types and dictionaries."""
    is_portable = not any(word in str(dtype) for word in ("map<", "extension<", "dictionary<"))
    return dtype if is_portable else pa.string()


def to_portable(table: pa.Table) -> pa.Table:
    """Convert the columns of a table to portable types. Values of other types become exact text."""
    for position, field in enumerate(table.schema):
        portable = to_portable_type(field.type)
        if portable != field.type:
            values = to_values(table.column(position))
            texts = [None if value is None else to_text(value, field.type) for value in values]
            table = table.set_column(position, field.name, pa.array(texts, portable))
    return table
