"""Convert results to Arrow tables, and tables from one schema to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import NoneType
from typing import Any, get_args, get_type_hints

import pyarrow as pa

from batch_infer.carried import make_converter, to_array, to_result_type, to_values
from batch_infer.records import RESULT_COLUMNS, Int32, ResultRow, Status

_ARROW_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    Status: pa.string(),
    bool: pa.bool_(),
    Int32: pa.int32(),
    int: pa.int64(),
    float: pa.float32(),
    datetime: pa.timestamp("us", "UTC"),
    # Not a map, which Hugging Face's datasets cannot read.
    Mapping[str, float]: pa.list_(pa.struct([("category", pa.string()), ("score", pa.float32())])),
}


def _arrow_type(hint: Any) -> pa.DataType:
    """Return the Arrow type for a type hint, which may be a union with None."""
    options = get_args(hint)
    if NoneType in options:
        hint = next(option for option in options if option is not NoneType)
    return _ARROW_TYPES[hint]


_HINTS = get_type_hints(ResultRow, include_extras=True)
SCHEMA = pa.schema([(column.name, _arrow_type(_HINTS[column.name])) for column in RESULT_COLUMNS])
"""Result columns in order. In a part, the carried columns come after these."""
SINCE = {column.name: column.metadata["since"] for column in RESULT_COLUMNS if "since" in column.metadata}
"""The format version that added each result column. Columns of version 1 are omitted."""
EARLIER_TYPES: dict[str, pa.DataType] = {"safety_scores": pa.map_(pa.string(), pa.float32())}
"""The earlier type of each result column whose type has changed."""
RETYPED = {column.name: column.metadata["retyped"] for column in RESULT_COLUMNS if "retyped" in column.metadata}
"""The format version that changed the type of each of these columns."""
VERSION = max(1, *SINCE.values(), *RETYPED.values())
"""Format version of new parts. Every part since version 2 records its version."""


def to_table(rows: Sequence[ResultRow], carried: pa.Schema) -> pa.Table:
    """Convert rows to an Arrow table of the result columns, followed by the carried columns."""
    columns = [pa.array([_to_value(getattr(row, field.name)) for row in rows], field.type) for field in SCHEMA]
    columns += [to_array([row.carried.get(field.name) for row in rows], field.type) for field in carried]
    return pa.table(columns, schema=pa.schema([*SCHEMA, *carried]))


def _to_value(value: Any) -> Any:
    """Return the value of a ResultRow as Arrow stores it."""
    if not isinstance(value, Mapping):
        return value
    return [{"category": category, "score": score} for category, score in value.items()]


def to_arguments(table: pa.Table) -> list[dict[str, Any]]:
    """Return the result columns of each row as arguments of ResultRow. The table may have any of these columns."""
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        if (scores := row.get("safety_scores")) is not None:
            row["safety_scores"] = {score["category"]: score["score"] for score in scores}
    return rows


def field_at(name: str, version: int) -> pa.Field:
    """Return a result column as parts of a format version have it."""
    field = SCHEMA.field(name)
    return field.with_type(EARLIER_TYPES[name]) if version < RETYPED.get(name, 1) else field


def cast_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Cast a table of results to a schema. Columns that are missing from the table are null.

    A column whose name is not in the schema gets the prefix `input_`, repeated until its name is in the schema. If that
    never happens, the column is dropped.
    """
    names = {_name_in(schema, name): name for name in table.column_names}
    columns = [
        _cast(table[names[field.name]], field.type) if field.name in names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _name_in(schema: pa.Schema, name: str) -> str:
    candidate = name
    while candidate not in schema.names and len(candidate) < len(name) + 100:
        candidate = f"input_{candidate}"
    return candidate


def _cast(column: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    if column.type == target:
        return column
    if EARLIER_TYPES["safety_scores"] in (column.type, target):
        return _convert_scores(column, target)
    convert = make_converter(to_result_type(column.type), target) or (lambda value: value)
    values = [None if value is None else convert(value) for value in to_values(column)]
    return pa.chunked_array([to_array(values, target)])


def _convert_scores(column: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    """Convert safety scores from their earlier type or to it."""
    values = column.to_pylist()
    if column.type == EARLIER_TYPES["safety_scores"]:
        values = [None if scores is None else [dict(zip(("category", "score"), pair, strict=True)) for pair in scores]
                  for scores in values]  # fmt: skip
    else:
        values = [None if scores is None else [tuple(score.values()) for score in scores] for scores in values]
    return pa.chunked_array([pa.array(values, target)])


def upgrade_table(table: pa.Table, names: Sequence[str], version: int) -> pa.Table:
    """Upgrade a table from an earlier format version to the result columns `names` and its carried columns.

    Result columns added after that version are null. A carried column with the name of an added column is renamed to
    input_<name>, as in prompt tables.
    """
    added = {name for name in names if SINCE.get(name, 1) > version}
    table = table.rename_columns([f"input_{name}" if name in added else name for name in table.column_names])
    results = [SCHEMA.field(name) for name in names]
    return cast_table(table, pa.schema([*results, *(field for field in table.schema if field.name not in names)]))
