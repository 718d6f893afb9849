"""Determine the types of a file's JSON columns, make column names unique, and assign columns to fields."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from batch_infer.errors import TableError
from batch_infer.settings import FIELDS
from batch_infer.table.base import SHOWN_COLUMNS, RawRow, TableFile, clean, is_utf8

MAX_COLUMNS = 1024
"""Maximum number of columns. Rows whose keys are values ({"a red circle": 1, ...}) would add columns without limit."""
MAX_DEPTH = 100
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""CSV separators. Spreadsheets write semicolons in locales with a decimal comma."""

_NULL, _BOOL, _INTEGER, _FLOAT, _TEXT, _INEXACT = 0, 1, 2, 4, 8, 16
"""Bit flags for the values in a column. _INEXACT marks an integer that float64 cannot represent exactly."""
_FLAGS = {type(None): _NULL, bool: _BOOL, float: _FLOAT, str: _TEXT, list: _TEXT, dict: _TEXT}
_TYPES = {
    _NULL: pa.null(),
    _BOOL: pa.bool_(),
    _INTEGER: pa.int64(),
    _INTEGER | _INEXACT: pa.int64(),
    _FLOAT: pa.float64(),
    _INTEGER | _FLOAT: pa.float64(),
}


class JsonColumns:
    """Collects the names and types of JSON columns in order of first appearance, since JSON has no header."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._flags: dict[str, int] = dict.fromkeys(names, _NULL)

    def add(self, cells: Mapping[str, Any]) -> None:
        """Add the columns of a row, except for invalid names, which `check_row` rejects."""
        for name, value in cells.items():
            flags = _FLAGS.get(value.__class__)
            if flags is None:
                flags = _number_flags(value)
            if name in self._flags:
                self._flags[name] |= flags
            elif len(self._flags) < MAX_COLUMNS and is_utf8(name):
                self._flags[name] = flags

    def schema(self) -> pa.Schema:
        return pa.schema([(name, _TYPES.get(flags, pa.string())) for name, flags in self._flags.items()])


def _number_flags(value: Any) -> int:
    if value.__class__ is not int or not -(2**63) <= value < 2**63:  # a Decimal, or a larger integer
        return _TEXT
    return _INTEGER if int(float(value)) == value else _INTEGER | _INEXACT


def check_row(row: RawRow, source: str, columns: frozenset[str]) -> RawRow:
    """Return a JSON row, with an error if it does not fit the table. `source` is its line or element."""
    error = None
    if not columns.issuperset(row.cells):
        unknown = clean(next(name for name in row.cells if name not in columns))
        error = (
            f"has a column that the table cannot have, {unknown[:40]!r}: "
            f"it is not UTF-8, or there are {MAX_COLUMNS} before it"
        )
    elif deep := [name for name, value in row.cells.items() if value.__class__ in (list, dict) and is_too_deep(value)]:
        error = f"is nested too deeply, in {deep[0]!r}"
    return row if error is None else row._replace(cells={}, error=f"{source} {error}")


def is_too_deep(value: Any) -> bool:
    """Return whether a list or object is nested too deeply for recursive code."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if outer.__class__ is dict else outer)
            if inner.__class__ in (list, dict)
        ]
        if not level:
            return False
    return True


def rename_doubled(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return unique names, with `tag_2` for the second `tag`, and a map from changed names to old names."""
    used, count = set(names), Counter[str]()
    distinct, renamed = [], {}
    for name in names:
        count[name] += 1
        if count[name] == 1:
            distinct.append(name)
            continue
        while (new := f"{name}_{count[name]}") in used:
            count[name] += 1
        used.add(new)
        renamed[new] = name
        distinct.append(new)
    return distinct, renamed


def rename_doubled_fields(dtype: pa.DataType, name: str, renamed: dict[str, str]) -> pa.DataType:
    """Return a type whose structs have unique field names, and add the changed names to `renamed`.

    `name` is the column. Python, pandas and SQL engines cannot read a struct with duplicate field names.
    """
    if pa.types.is_struct(dtype):
        names, duplicates = rename_doubled([field.name for field in dtype])
        renamed.update({f"{name}.{new}": f"{name}.{old}" for new, old in duplicates.items()})
        fields = [
            field.with_name(new).with_type(rename_doubled_fields(field.type, f"{name}.{new}", renamed))
            for field, new in zip(dtype, names, strict=True)
        ]
        return pa.struct(fields)
    if pa.types.is_map(dtype):
        key, item = (
            field.with_type(rename_doubled_fields(field.type, name, renamed))
            for field in (dtype.key_field, dtype.item_field)
        )
        return pa.map_(key, item, dtype.keys_sorted)
    if not isinstance(dtype, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        return dtype
    field = dtype.value_field.with_type(rename_doubled_fields(dtype.value_type, name, renamed))
    if isinstance(dtype, pa.FixedSizeListType):
        return pa.list_(field, dtype.list_size)
    return pa.list_(field) if isinstance(dtype, pa.ListType) else pa.large_list(field)


def describe_renamed(file: str, renamed: Mapping[str, str]) -> str:
    """Return a message with the new names of columns that share a name."""
    pairs = [f"another {old!r} as {new!r}" for new, old in list(renamed.items())[:SHOWN_COLUMNS]]
    more = f" and {len(renamed) - SHOWN_COLUMNS:,} more" if len(renamed) > SHOWN_COLUMNS else ""
    return f"{file} has columns of one name: carried are {', '.join(pairs)}{more}"


def map_fields(
    file: TableFile, names: Sequence[str], columns: Mapping[str, str], renamed: Mapping[str, str]
) -> dict[str, str]:
    """Return the column of each field. `columns` contains the user's names for fields, '' for a field without a column.

    Raises TableError if the prompt column, or a column named by the user, is missing or duplicated.
    """
    if file.format == ".txt":
        columns = {**columns, "prompt": "prompt"}
    fields = {}
    for field in FIELDS:
        name = columns.get(field, field)
        if name and name in names:
            fields[field] = name
        elif field == "prompt" or (name and field in columns):
            purpose = "" if name == field else f" for {field}"
            raise TableError(f"{file.name} has no column {name!r}{purpose}; {_advise(file, field, name, names)}")
    if duplicates := sorted(set(fields.values()) & set(renamed.values())):
        raise TableError(f"{file.name} has two columns named {duplicates[0]!r}; rename one")
    return fields


def _advise(file: TableFile, field: str, missing: str, names: Sequence[str]) -> str:
    """Return advice on a missing column for its error message."""
    for candidate in (missing, field):
        match = next((name for name in names if name.strip().lower() == candidate.strip().lower()), None)
        if candidate and match is not None:
            return f"try --column {shlex.quote(f'{field}={match}')}"
    if len(names) == 1 and (separator := next((separator for separator in SEPARATORS if separator in names[0]), None)):
        return f"its columns seem to be separated by {separator!r}: save it as .csv, or as Parquet"
    if file.origin == "stdin" and file.format == ".csv":
        return (
            f"standard input is read as CSV, and its first line is {', '.join(names)[:80]!r}: "
            "a list of plain prompts wants a .txt file (or a first line 'prompt', where no prompt holds a comma)"
        )
    present = ", ".join(repr(name) for name in names[:12])
    return f"it has {present}; name one with --column {field}=NAME"
