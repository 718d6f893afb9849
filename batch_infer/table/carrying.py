"""The columns that are carried through to the results: their names, their common types and their cells."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from batch_infer.carried import (
    common_type,
    estimate_bytes,
    make_converter,
    make_python_reader,
    make_result_names,
    result_type,
    to_array,
    to_text,
)
from batch_infer.records import digest
from batch_infer.table.endings import TableFile
from batch_infer.table.layout import Layout
from batch_infer.table.parquet import BATCH, Parquet
from batch_infer.table.partitions import Partitioned
from batch_infer.table.raw import RawRow, Reader

LARGEST_ROW = 1 << 20
"""Bytes of a row's carried cells together, so that memory does not grow with what a table holds."""


DIGEST = 20
"""Hexadecimal digits of a row's digest: the chance that two of a billion differing rows share one is 4e-7."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that can be read."""

    file: TableFile
    reader: Reader
    layout: Layout


class CellReader:
    """How the cells of a file's rows are read: those of its fields, and those that are carried."""

    def __init__(self, opened: Opened, schema: pa.Schema) -> None:
        """`schema` has the type of each carried column."""
        kinds = opened.reader.schema
        self.fields = opened.layout.fields
        self._python = {
            field: read for field, name in self.fields.items() if (read := make_python_reader(kinds.field(name).type))
        }
        self._kinds = {old: result_type(kinds.field(old).type) for old in opened.layout.carried}
        self._carried = [
            (old, new, make_converter(self._kinds[old], schema.field(new).type))
            for old, new in opened.layout.carried.items()
        ]

    def own(self, cells: dict[str, Any]) -> dict[str, Any]:
        """The cells by field as Python's own values, such as datetime."""
        for field, read in self._python.items():
            if cells.get(field) is not None:
                cells[field] = read(cells[field])
        return cells

    def digest(self, own: Mapping[str, Any], raw: RawRow) -> str:
        """What a row is known by, whatever file and place it has: a digest of its cells as text.

        Carried cells count: of two rows that differ in them alone, each keeps its image wherever it goes. Empty cells
        do not, nor how a whole number is stored.
        """
        carried = {name: _content(raw.cells.get(name), kind) for name, kind in self._kinds.items()}
        cells = {field: _content(value) for field, value in own.items()}
        parts = [{name: text for name, text in part.items() if text} for part in (cells, carried)]
        return digest(parts)[:DIGEST]

    def carried(self, raw: RawRow) -> tuple[dict[str, Any], str | None]:
        """The carried cells by their name in the results, and what is wrong with their size."""
        get = raw.cells.get
        found = {}
        for old, new, convert in self._carried:
            value = get(old)
            if convert is not None and value is not None and value.__class__ is not str:
                value = convert(value)
            found[new] = value
        return found, _drop_largest(found) if estimate_bytes(found.values()) > LARGEST_ROW else None


def _content(value: Any, kind: pa.DataType | None = None) -> str:
    """A cell as text. A whole number is one of float64 where a cell of its column is missing."""
    if value is None:
        return ""
    return to_text(int(value) if value.__class__ is float and value.is_integer() else value, kind)


def _drop_largest(cells: dict[str, Any]) -> str:
    """Take out cells, the largest first, until the others fit into a row; return the sentence that says so."""
    weights = {name: estimate_bytes([value]) for name, value in cells.items()}
    dropped = []
    while sum(weights.values()) > LARGEST_ROW:
        name = max(weights, key=weights.__getitem__)
        dropped.append(f"{name!r} of {weights.pop(name)} bytes")
        cells[name] = None
    return f"the carried cells of a row may be {LARGEST_ROW} bytes together: left out {', '.join(dropped)}"


def name_carried(files: Iterable[Opened], reserved: Collection[str]) -> dict[str, str]:
    """The name in the results of each carried column: none differs from another's by case alone."""
    return make_result_names((name for opened in files for name in opened.layout.carried), reserved)


def with_names(opened: Opened, names: Mapping[str, str]) -> Opened:
    """A file with these names for its carried columns."""
    carried = {name: names[name] for name in opened.layout.carried}
    return replace(opened, layout=replace(opened.layout, carried=carried))


def common_schema(files: Iterable[Opened]) -> tuple[pa.Schema, list[str]]:
    """One type for each carried column, which holds what every file has in it, and a warning for each made text."""
    found: dict[str, list[tuple[Opened, str]]] = {}
    for opened in files:
        for name, carried in opened.layout.carried.items():
            found.setdefault(carried, []).append((opened, name))
    fields = []
    warnings: list[str] = []
    for carried, columns in found.items():
        kinds = {opened.file.name: result_type(opened.reader.schema.field(name).type) for opened, name in columns}
        kind = common_type(kinds.values(), partial(_arrays, columns))
        fields.append((carried, kind))
        warnings += _drift(carried, kinds, kind)
    return pa.schema(fields), warnings


def _arrays(columns: Iterable[tuple[Opened, str]]) -> Iterator[pa.Array]:
    """All values of a column whose type depends on them."""
    for opened, name in columns:
        reader = opened.reader
        if isinstance(reader, Partitioned) and name not in reader.values:
            reader = reader.reader
        if isinstance(reader, Parquet):
            yield from reader.arrays(name)
            continue
        kind = reader.schema.field(name).type
        values = (row.cells.get(name) for row in reader.rows() if not row.error)
        while batch := list(islice(values, BATCH)):
            yield to_array(batch, kind)


def _drift(carried: str, kinds: Mapping[str, pa.DataType], kind: pa.DataType) -> Iterator[str]:
    """The warning about a column that is carried as text and has another type in some file."""
    if not pa.types.is_string(kind):
        return
    first: dict[pa.DataType, str] = {}
    for file, each in kinds.items():
        first.setdefault(each, file)
    first.pop(pa.null(), None)
    if len(first) > 1:
        where = " and ".join(f"{each} in {file}" for each, file in list(first.items())[:2])
        yield f"column {carried!r} is {where}: its values are carried as text"
