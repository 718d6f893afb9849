"""The columns of JSON rows, which no header names: found out by a walk over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from batch_infer.errors import RowError
from batch_infer.table.raw import RawRow
from batch_infer.table.text import clean, is_utf8

MOST_COLUMNS = 1024
"""Keys that are values ({"a red circle": 1, ...}) would make a column of every row."""
DEEPEST = 100

NULL, BOOL, WHOLE, REAL, TEXT, INEXACT = 0, 1, 2, 4, 8, 16
"""What a column holds, as bits. INEXACT: a whole number that float64 does not hold as it is."""
_PLAIN = {type(None): NULL, bool: BOOL, float: REAL, str: TEXT, list: TEXT, dict: TEXT}
_TYPES = {NULL: pa.null(), BOOL: pa.bool_(), REAL: pa.float64(), WHOLE | REAL: pa.float64()}
_TYPES |= {WHOLE: pa.int64(), WHOLE | INEXACT: pa.int64()}


class Columns:
    """The names of all columns, in the order of their first rows, and what each holds."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._held: dict[str, int] = dict.fromkeys(names, NULL)

    def add(self, cells: Mapping[str, Any]) -> None:
        """Take in a row. Its names that no column can have are left out, and cost that row later."""
        held = self._held
        for name, value in cells.items():
            kind = _PLAIN.get(value.__class__)
            if kind is None:
                kind = _whole(value)
            if name in held:
                held[name] |= kind
            elif len(held) < MOST_COLUMNS and is_utf8(name):
                held[name] = kind

    def schema(self) -> pa.Schema:
        return pa.schema([(name, _TYPES.get(kinds, pa.string())) for name, kinds in self._held.items()])


def checked(row: RawRow, where: str, known: frozenset[str]) -> RawRow:
    """A row of JSON values, with its fault where the table cannot take it. `where` says line or element."""
    cells = row.cells
    try:
        if not known.issuperset(cells):
            unknown = clean(next(name for name in cells if name not in known))
            raise RowError(
                f"has a column that the table cannot have, {unknown[:40]!r}: "
                f"it is not UTF-8, or there are {MOST_COLUMNS} before it"
            )
        for name, value in cells.items():
            if value.__class__ in (list, dict) and is_too_deep(value):
                raise RowError(f"is nested too deeply, in {name!r}")
    except RowError as error:
        return row._replace(cells={}, error=f"{where} {error}")
    return row


def _whole(value: Any) -> int:
    if value.__class__ is not int or not -(2**63) <= value < 2**63:  # a Decimal, or a larger integer
        return TEXT
    return WHOLE if int(float(value)) == value else WHOLE | INEXACT


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects lie in this one deeper than whatever walks over them later may go."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if outer.__class__ is dict else outer)
            if inner.__class__ in (list, dict)
        ]
        if not level:
            return False
    return True
