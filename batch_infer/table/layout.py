"""Which column of a file holds which field, and under which name and type the others are carried."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batch_infer.errors import TableError
from batch_infer.settings import FIELDS
from batch_infer.table.delimited import MARKS
from batch_infer.table.endings import TableFile
from batch_infer.table.plain import COLUMN


@dataclass(frozen=True, slots=True)
class Layout:
    """`fields` has the column of each field, `carried` the name in the results of each other column."""

    fields: Mapping[str, str]
    carried: Mapping[str, str]


def lay_out(file: TableFile, names: list[str], columns: Mapping[str, str], reserved: Collection[str]) -> Layout:
    """Raises TableError where a column is missing that the user named, or the prompts'."""
    if file.format == ".txt":
        columns = {**columns, "prompt": COLUMN}
    fields = {}
    for field in FIELDS:
        name = columns.get(field, field)
        if name and name in names:
            fields[field] = name
        elif field == "prompt" or (name and field in columns):
            unless = "" if name == field else f" for {field}"
            raise TableError(f"{file.name} has no column {name!r}{unless}; {_advice(file, field, name, names)}")
    taken, there = set(fields.values()), set(names)
    return Layout(fields, {name: _carried_name(name, there, reserved) for name in names if name not in taken})


def common_schema(files: Iterable[tuple[Layout, pa.Schema]]) -> pa.Schema:
    """One type a carried column: the widest of all files', text where they cannot meet."""
    types: dict[str, pa.DataType] = {}
    for layout, schema in files:
        for name, carried in layout.carried.items():
            found = _plain(schema.field(name).type)
            types[carried] = common_type(types[carried], found) if carried in types else found
    return pa.schema(list(types.items()))


def carrier(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """How a value that is neither null nor text comes to be of a column's common type; None: it is."""
    if pa.types.is_string(kind):
        return _as_text
    return float if pa.types.is_float64(kind) else None


def _as_text(value: Any) -> str:
    """Where columns of other types meet, lists and booleans are what they are in JSON."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (bool, list, dict)) else str(value)


def _carried_name(name: str, names: Collection[str], reserved: Collection[str]) -> str:
    while name in reserved:
        name = f"input_{name}"
        while name in names:  # the table has such a column of its own
            name = f"input_{name}"
    return name


def _advice(file: TableFile, field: str, wanted: str, names: list[str]) -> str:
    for like in (wanted, field):
        near = next((name for name in names if name.strip().lower() == like.strip().lower()), None)
        if like and near is not None:
            return f"try --column {shlex.quote(f'{field}={near}')}"
    if len(names) == 1 and (mark := next((mark for mark in MARKS if mark in names[0]), None)):
        return f"its columns seem to be separated by {mark!r}: save it as .csv, or as Parquet"
    if file.origin == "stdin" and file.format == ".csv":
        return (
            f"standard input is taken for CSV, and its first line is {', '.join(names)[:80]!r}: "
            "a list of plain prompts wants a .txt file (or a first line 'prompt', where no prompt holds a comma)"
        )
    found = ", ".join(repr(name) for name in names[:12])
    return f"it has {found}; name one with --column {field}=NAME"


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """A type that holds every value of both: text, where nothing closer does."""
    kinds = (first, second)
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if all(map(pa.types.is_unsigned_integer, kinds)):
        return pa.uint64()
    if all(map(pa.types.is_integer, kinds)):
        return pa.string() if pa.uint64() in kinds else pa.int64()
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        return pa.float64()
    return pa.string()
