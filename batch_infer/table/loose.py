"""Rows that stand in no file: those of a request to a server, or of a data frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from batch_infer.records import PromptRequest, ResultRow, Source
from batch_infer.settings import FIELDS
from batch_infer.table.endings import make_default_id
from batch_infer.table.ids import id_text
from batch_infer.table.rows import Cells, RowRules, invalid, own_cells, requests
from batch_infer.table.text import is_utf8

NAME = "request"
"""Stands for the file, in ids too."""


def parse_rows(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], rules: RowRules
) -> Iterator[PromptRequest | ResultRow]:
    """Every row, in order, as its requests or as its invalid result.

    `columns` has the names of fields that are called otherwise. A row without an id is known by its number; two may
    have one id, which says no more here than what seed a row derives. Cells that are no fields are not looked at.
    """
    named = {field: name for field in FIELDS if (name := columns.get(field, field))}
    for number, row in enumerate(rows):
        own = own_cells(named, row.get)
        value = own.pop("id", None)
        known = make_default_id(NAME, number) if value is None else id_text(value)
        cells = Cells(known, Source(NAME, number), own, {})
        broken = [field for field, cell in own.items() if isinstance(cell, str) and not is_utf8(cell)]
        if broken:  # told here in other words than of a table, which can be saved anew
            yield invalid(cells, f"the {broken[0]} holds a lone surrogate, which is half a character: send whole ones")
        elif isinstance(value, (list, dict)):
            yield invalid(cells, f"the id is not text but {type(value).__name__}")
        else:
            yield from requests(cells, rules)
