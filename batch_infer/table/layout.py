"""Which column of a file holds which field; the others are carried."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

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


def lay_out(file: TableFile, names: list[str], columns: Mapping[str, str]) -> Layout:
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
    taken = set(fields.values())
    return Layout(fields, {name: name for name in names if name not in taken})


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
