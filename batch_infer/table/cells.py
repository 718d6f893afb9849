"""The cells of rows: those of fields, those that are carried to the results, and columns named almost as a field is."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from batch_infer.carried import (
    common_type,
    estimate_bytes,
    make_converter,
    make_python_reader,
    make_result_names,
    result_type,
    to_text,
)
from batch_infer.records import digest
from batch_infer.settings import FIELDS
from batch_infer.table.base import RawRow, Reader, TableFile

LARGEST_ROW = 1 << 20
"""Bytes of a row's carried cells together, so that memory does not grow with what a table holds."""
DIGEST_DIGITS = 20
"""Hexadecimal digits of a row's digest: the chance that two of a billion differing rows share one is 4e-7."""

SYNONYMS = {
    "id": ("uid", "rowid", "promptid", "customid"),
    "negative_prompt": ("negative", "neg", "negprompt", "negativetext", "uncond"),
    "seed": ("seeds", "randomseed", "rngseed", "noiseseed"),
    "height": ("h", "imageheight"),
    "width": ("w", "imagewidth"),
    "num_inference_steps": ("steps", "numsteps", "nsteps", "inferencesteps", "samplingsteps", "ddimsteps"),
    "guidance_scale": ("guidance", "cfg", "cfgscale"),
    "guidance_rescale": ("rescale", "cfgrescale"),
    "num_images_per_prompt": ("n", "numimages", "nimages", "imagesperprompt", "numsamples", "nsamples", "numoutputs"),
}
"""What other tools call the fields, in lower case and without spaces, hyphens and underscores."""
SIMILAR = 0.8
"""difflib's ratio from which a name of the same first letter counts as misspelt: `heigth`, and not `weight`."""
SHORTEST_MISSPELT = 5
"""Letters of a name that may be misspelt. Shorter names are similar to too many other words."""


@dataclass(slots=True)
class OpenTable:
    """A file that can be read.

    `path_columns` are the columns of its path, which replace those of the file. `fields` has the column of each field,
    `carried` the result name of each other column.
    """

    file: TableFile
    reader: Reader
    path_columns: Mapping[str, str | None]
    fields: Mapping[str, str]
    carried: dict[str, str]

    def rows(self) -> Iterator[RawRow]:
        rows = self.reader.rows()
        if not self.path_columns:
            return rows
        return (row._replace(cells={**row.cells, **self.path_columns}) for row in rows)

    def type_of(self, column: str) -> pa.DataType:
        return pa.string() if column in self.path_columns else self.reader.schema.field(column).type


class CellReader:
    """The conversion of the cells of one file's rows. `schema` has the type of each carried column."""

    def __init__(self, table: OpenTable, schema: pa.Schema) -> None:
        self.fields = table.fields
        self._python_readers = {
            field: reader
            for field, column in table.fields.items()
            if (reader := make_python_reader(table.type_of(column)))
        }
        self._kinds = {column: result_type(table.type_of(column)) for column in table.carried}
        self._converters = [
            (column, name, make_converter(self._kinds[column], schema.field(name).type))
            for column, name in table.carried.items()
        ]

    def to_python(self, cells: dict[str, Any]) -> dict[str, Any]:
        """Convert the cells of fields to Python's own types, such as datetime, in place."""
        for field, read in self._python_readers.items():
            if cells.get(field) is not None:
                cells[field] = read(cells[field])
        return cells

    def digest(self, fields: Mapping[str, Any], row: RawRow) -> str:
        """Return a digest of a row's cells as text, which does not depend on its file and position.

        Carried cells count: of two rows that differ in them alone, each keeps its image wherever it moves. Empty cells
        do not, nor how a whole number is stored.
        """
        carried = {column: _digest_text(row.cells.get(column), kind) for column, kind in self._kinds.items()}
        cells = {field: _digest_text(value) for field, value in fields.items()}
        return digest([{name: text for name, text in part.items() if text} for part in (cells, carried)])[
            :DIGEST_DIGITS
        ]

    def read_carried(self, row: RawRow) -> tuple[dict[str, Any], str | None]:
        """Return the carried cells by their result names, and what is wrong with their size."""
        get = row.cells.get
        cells = {}
        for column, name, convert in self._converters:
            value = get(column)
            if convert is not None and value is not None and value.__class__ is not str:
                value = convert(value)
            cells[name] = value
        return cells, _drop_largest(cells) if estimate_bytes(cells.values()) > LARGEST_ROW else None


def _digest_text(value: Any, kind: pa.DataType | None = None) -> str:
    """Return a cell as text. Whole floats are integers, which become floats where a cell of the column is missing."""
    if value is None:
        return ""
    return to_text(int(value) if value.__class__ is float and value.is_integer() else value, kind)


def _drop_largest(cells: dict[str, Any]) -> str:
    """Set the largest cells to None until the others fit into a row; return the message about them."""
    sizes = {name: estimate_bytes([value]) for name, value in cells.items()}
    dropped = []
    while sum(sizes.values()) > LARGEST_ROW:
        name = max(sizes, key=sizes.__getitem__)
        dropped.append(f"{name!r} of {sizes.pop(name)} bytes")
        cells[name] = None
    return f"the carried cells of a row may be {LARGEST_ROW} bytes together: left out {', '.join(dropped)}"


def make_carried_schema(tables: Iterable[OpenTable], result_columns: Collection[str]) -> tuple[pa.Schema, list[str]]:
    """Name and type the carried columns, in the tables too, and return them with a warning for each made text.

    No name differs from another or from a result column by case alone. A type holds what every file has in the column.
    """
    tables = list(tables)
    names = make_result_names((column for table in tables for column in table.carried), result_columns)
    columns: dict[str, list[tuple[OpenTable, str]]] = {}
    for table in tables:
        table.carried = {column: names[column] for column in table.carried}
        for column, name in table.carried.items():
            columns.setdefault(name, []).append((table, column))
    fields, warnings = [], list[str]()
    for name, sources in columns.items():
        kinds = {table.file.name: result_type(table.type_of(column)) for table, column in sources}
        kind = common_type(kinds.values(), partial(_read_arrays, sources))
        fields.append((name, kind))
        if pa.types.is_string(kind):
            warnings += _warn_of_text(name, kinds)
    return pa.schema(fields), warnings


def _read_arrays(sources: Iterable[tuple[OpenTable, str]]) -> Iterator[pa.Array]:
    """Yield all values of a column whose type depends on them. (A column of the path is text, so it does not.)"""
    for table, column in sources:
        yield from table.reader.arrays(column)


def _warn_of_text(name: str, kinds: Mapping[str, pa.DataType]) -> Iterator[str]:
    """Warn of a column that is carried as text because its types differ between files."""
    first: dict[pa.DataType, str] = {}
    for file, kind in kinds.items():
        first.setdefault(kind, file)
    first.pop(pa.null(), None)
    if len(first) > 1:
        where = " and ".join(f"{kind} in {file}" for kind, file in list(first.items())[:2])
        yield f"column {name!r} is {where}: its values are carried as text"


def find_near_fields(tables: Iterable[OpenTable], columns: Mapping[str, str]) -> list[str]:
    """Return a sentence for each carried column that seems to be meant for a field which its table lacks.

    `columns` are the user's own names for fields; a field whose name is '' is not missed.
    """
    files: dict[tuple[str, str], list[str]] = {}
    for table in tables:
        missing = [field for field in FIELDS if field not in table.fields and columns.get(field) != ""]
        for field, name in _match_near(missing, table.carried):
            files.setdefault((field, name), []).append(table.file.name)
    sentences = []
    for (field, name), names in files.items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        option = f"--column {shlex.quote(f'{field}={name}')}"
        sentences.append(
            f"{names[0]}{more}: column {name!r} is carried and has no effect; if it is the {field}, add {option}"
        )
    return sentences


def _match_near(missing: list[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each missing field with the first column whose name is near it."""
    keys = {name: _normalize(name) for name in names}
    for field in missing:
        wanted = _normalize(field)
        near = [name for name, key in keys.items() if key == wanted or key in SYNONYMS.get(field, ())]
        if not near and len(wanted) >= SHORTEST_MISSPELT:
            near = [name for name, key in keys.items() if _is_similar(key, wanted)]
        if near:
            yield field, near[0]


def _normalize(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _is_similar(key: str, wanted: str) -> bool:
    if len(key) < SHORTEST_MISSPELT or key[0] != wanted[0]:
        return False
    return difflib.SequenceMatcher(None, key, wanted).ratio() >= SIMILAR
