"""Where the rows of a JSON document are, and the cells of what stands there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from batch_infer.errors import RowError
from batch_infer.table.columns import MOST_COLUMNS


@dataclass(frozen=True, slots=True)
class DocumentFormat:
    """Where the rows of a document are. `columns` names the cells of a row that is a list or a bare prompt.

    `parameters` are cells of every row that has none of its own.
    """

    payload: bool
    columns: tuple[str, ...]
    parameters: dict[str, Any] = field(default_factory=dict)


def payload_columns(values: Sequence[Any]) -> tuple[str, ...]:
    """What a payload's `columns` are called. Raises RowError."""
    if len(values) > MOST_COLUMNS:
        raise RowError(f"there are more than {MOST_COLUMNS}")
    if twice := [name for name, count in Counter(map(str, values)).items() if count > 1]:
        raise RowError(f"two are named {twice[0]!r}")
    return tuple(map(str, values))


def element_cells(element: Any, shape: DocumentFormat) -> dict[str, Any]:
    """The cells of a row, by column. Raises RowError for what is no row."""
    if isinstance(element, dict):
        cells = element
    elif isinstance(element, str):
        cells = {shape.columns[0]: element}
    elif isinstance(element, list) and shape.payload:
        if len(element) > len(shape.columns):
            raise RowError(f"has {len(element)} cells where columns names {len(shape.columns)}")
        cells = dict(zip(shape.columns, element, strict=False))
    else:
        raise RowError(f"is neither an object nor a prompt but {type(element).__name__}")
    if shape.parameters:
        cells = {**shape.parameters, **{name: value for name, value in cells.items() if value is not None}}
    return cells
