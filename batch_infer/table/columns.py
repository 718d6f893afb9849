"""Make column names unique, and assign columns to fields."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa
from pyarrow import types

from batch_infer.carried import convert_items
from batch_infer.errors import TableError
from batch_infer.settings import FIELDS
from batch_infer.table.base import MAX_SHOWN_COLUMNS, TableFile

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""CSV separators. Spreadsheets write semicolons in locales with a decimal comma."""


def rename_duplicates(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return unique names, with `tag_2` for the second `tag`, and a map from changed names to old names."""
    used, count = set(names), Counter[str]()
    distinct, renamed = [], {}
    for name in names:
        count[name] += 1
        new = name
        if count[name] > 1:
            while (new := f"{name}_{count[name]}") in used:
                count[name] += 1
            used.add(new)
            renamed[new] = name
        distinct.append(new)
    return distinct, renamed


def rename_duplicate_fields(dtype: pa.DataType, name: str, renamed: dict[str, str]) -> pa.DataType:
    """Return a type whose structs have unique field names, and add the changed names to `renamed`.

    `name` is the column. Python, pandas and SQL engines cannot read a struct with duplicate field names.
    """
    if types.is_struct(dtype):
        names, duplicates = rename_duplicates([field.name for field in dtype])
        renamed.update({f"{name}.{new}": f"{name}.{old}" for new, old in duplicates.items()})
        return pa.struct(
            field.with_name(new).with_type(rename_duplicate_fields(field.type, f"{name}.{new}", renamed))
            for field, new in zip(dtype, names, strict=True)
        )
    if types.is_map(dtype) or types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype):
        return convert_items(dtype, lambda item: rename_duplicate_fields(item, name, renamed))
    return dtype


def describe_renamed(file: str, renamed: Mapping[str, str]) -> str:
    """Return a notice with the new names of columns that share a name, '' if no column is renamed."""
    if not renamed:
        return ""
    pairs = [f"another {old!r} is carried as {new!r}" for new, old in list(renamed.items())[:MAX_SHOWN_COLUMNS]]
    more = f" and {len(renamed) - MAX_SHOWN_COLUMNS:,} more" if len(renamed) > MAX_SHOWN_COLUMNS else ""
    return f"{file} has columns with the same name: {', '.join(pairs)}{more}"


def map_fields(
    file: TableFile, names: Sequence[str], columns: Mapping[str, str], renamed: Mapping[str, str]
) -> dict[str, str]:
    """Return the column of each field. `columns` maps fields to the user's column names, '' for no column.

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
