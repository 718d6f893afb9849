"""Assign columns to fields, convert the cells of fields, and carry all other cells to the results."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batch_infer.carried import (
    estimate_bytes,
    find_common_type,
    make_converter,
    make_python_reader,
    make_result_names,
    to_result_type,
    to_text,
)
from batch_infer.errors import TableError
from batch_infer.records import digest
from batch_infer.settings import FIELDS, LORA_FIELD
from batch_infer.table.base import MAX_SHOWN_COLUMNS, SEPARATORS, RawRow, Reader, TableFile
from batch_infer.table.fields import read_fields

MAX_CARRIED_BYTES = 1 << 20
"""Maximum total bytes of a row's carried cells, to bound memory use."""
DIGEST_DIGITS = 20
"""Number of hexadecimal digits in a row's digest. In a billion rows, two share a digest with probability 4e-7."""

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
"""Names that other tools use for the fields, in the form that `_normalize` returns."""
MIN_SIMILARITY = 0.8
"""Minimum difflib ratio of a misspelt name whose first letter is right: `heigth` matches height, `weight` does not."""
MIN_FUZZY_LENGTH = 5
"""Minimum length of a misspelt name and of its field. Shorter names resemble too many other words."""


@dataclass(slots=True)
class OpenTable:
    """A readable file and its columns.

    `path_columns` come from the file's path and override columns of the file. `fields` maps fields to columns, and
    `carried` maps the other columns to their names in the results. `lora_column` names the rows' LoRAs, and is also
    carried.
    """

    file: TableFile
    reader: Reader
    path_columns: Mapping[str, str | None]
    fields: Mapping[str, str]
    carried: dict[str, str]
    lora_column: str | None = None

    def read_rows(self) -> Iterator[RawRow]:
        rows = self.reader.read_rows()
        if not self.path_columns:
            return rows
        return (row._replace(cells={**row.cells, **self.path_columns}) for row in rows)

    def get_type(self, column: str) -> pa.DataType:
        return pa.string() if column in self.path_columns else self.reader.schema.field(column).type


class CellReader:
    """Converts the cells of one file. `schema` contains the types of the carried columns in the results."""

    def __init__(self, table: OpenTable, schema: pa.Schema) -> None:
        self._fields, self._lora_column = table.fields, table.lora_column
        self._python_readers = {
            field: reader
            for field, column in {**table.fields, LORA_FIELD: table.lora_column}.items()
            if column is not None and (reader := make_python_reader(table.get_type(column)))
        }
        self._dtypes = {column: to_result_type(table.get_type(column)) for column in table.carried}
        self._converters = [
            (column, name, make_converter(self._dtypes[column], schema.field(name).type))
            for column, name in table.carried.items()
        ]

    def read_fields(self, row: RawRow) -> dict[str, Any]:
        """Return the cells by field in Python's own types such as datetime. Empty cells are None."""
        cells = read_fields(self._fields, row.cells.get)
        for field, read in self._python_readers.items():
            if cells.get(field) is not None:
                cells[field] = read(cells[field])
        return cells

    def read_lora(self, row: RawRow) -> Any:
        """Return the cell that names the row's LoRA, or None if there is no such column."""
        cell = None if self._lora_column is None else row.cells.get(self._lora_column)
        read = self._python_readers.get(LORA_FIELD)
        return cell if read is None or cell is None else read(cell)

    def digest(self, fields: Mapping[str, Any], row: RawRow) -> str:
        """Return a digest of the text of a row's cells. It does not depend on the row's file and position.

        Carried cells count, so that rows that differ only in carried cells keep their images if they move. Empty cells
        do not count. A whole number has the same digest whether it is stored as an integer or a float.
        """
        carried = {column: _format_cell(row.cells.get(column), dtype) for column, dtype in self._dtypes.items()}
        cells = {field: _format_cell(value) for field, value in fields.items()}
        nonempty = [{name: text for name, text in texts.items() if text} for texts in (cells, carried)]
        return digest(nonempty)[:DIGEST_DIGITS]

    def read_carried(self, row: RawRow) -> tuple[dict[str, Any], str | None]:
        """Return the carried cells by result name. If they are too large, drop some and return an error message."""
        cells = {}
        for column, name, convert in self._converters:
            value = row.cells.get(column)
            if convert is not None and value is not None and value.__class__ is not str:
                value = convert(value)
            cells[name] = value
        return cells, _drop_largest(cells) if estimate_bytes(cells.values()) > MAX_CARRIED_BYTES else None


def _format_cell(value: Any, dtype: pa.DataType | None = None) -> str:
    """Return a cell as text. Whole floats become integers: pandas stores integers as floats if one is missing."""
    if value is None:
        return ""
    if value.__class__ is float and value.is_integer():
        value = int(value)
    return to_text(value, dtype)


def _drop_largest(cells: dict[str, Any]) -> str:
    """Set the largest cells to None until the rest fits the limit. Return an error message that names those dropped."""
    sizes = {name: estimate_bytes([value]) for name, value in cells.items()}
    dropped = []
    while sum(sizes.values()) > MAX_CARRIED_BYTES:
        name = max(sizes, key=sizes.__getitem__)
        dropped.append(f"{name!r} of {sizes.pop(name)} bytes")
        cells[name] = None
    return f"the row's carried cells exceed {MAX_CARRIED_BYTES} bytes in total: dropped {', '.join(dropped)}"


def make_carried_schema(tables: Sequence[OpenTable], result_columns: Collection[str]) -> tuple[pa.Schema, list[str]]:
    """Return the schema of the carried columns, and a warning for each column that is text because its types differ.

    Also set the result names in each table's `carried`. Ignoring case, these names are unique and not in
    `result_columns`. The type of a column can represent its values in all files.
    """
    names = make_result_names((column for table in tables for column in table.carried), result_columns)
    columns: dict[str, list[tuple[OpenTable, str]]] = {}
    for table in tables:
        table.carried = {column: names[column] for column in table.carried}
        for column, name in table.carried.items():
            columns.setdefault(name, []).append((table, column))
    fields, warnings = [], list[str]()
    for name, sources in columns.items():
        dtypes = {table.file.name: to_result_type(table.get_type(column)) for table, column in sources}
        # A column in a file's path has no array, but is text, and arrays are read only if all types are numeric.
        arrays = (array for table, column in sources for array in table.reader.read_arrays(column))
        dtype = find_common_type(dtypes.values(), arrays)
        fields.append((name, dtype))
        if pa.types.is_string(dtype):
            warnings += _warn_about_text(name, dtypes)
    return pa.schema(fields), warnings


def _warn_about_text(name: str, dtypes: Mapping[str, pa.DataType]) -> Iterator[str]:
    """Yield a warning if the types of a column that is carried as text differ between files."""
    first_files: dict[pa.DataType, str] = {}
    for file, dtype in dtypes.items():
        first_files.setdefault(dtype, file)
    first_files.pop(pa.null(), None)
    if len(first_files) > 1:
        examples = " and ".join(f"{dtype} in {file}" for dtype, file in list(first_files.items())[:2])
        yield f"column {name!r} is {examples}: its values are carried as text"


def map_fields(
    file: TableFile,
    names: Sequence[str],
    columns: Mapping[str, str],
    renamed: Mapping[str, str],
    names_of_fields: Sequence[str] = FIELDS,
) -> dict[str, str]:
    """Return the column of each field that has one. `columns` maps fields to the user's column names, '' for no column.

    Raises TableError if the prompt column or a column named by the user is missing, or if a field has two columns with
    the same name.
    """
    if file.format in (".txt", ".prompts.txt"):
        columns = {**columns, "prompt": "prompt"}
    fields = {}
    for field in names_of_fields:
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
    """Return the advice in the error message about a missing column."""
    for candidate in (missing, field):
        match = next((name for name in names if name.strip().lower() == candidate.strip().lower()), None)
        if candidate and match is not None:
            return f"try --column {shlex.quote(f'{field}={match}')}"
    if len(names) == 1 and (separator := next((separator for separator in SEPARATORS if separator in names[0]), None)):
        return f"its columns seem to be separated by {separator!r}: save it as .csv, or as Parquet"
    if file.origin == "stdin" and file.format == ".csv":
        return (
            f"standard input is read as CSV, and its first line is {', '.join(names)[:80]!r}: "
            "plain prompts need a .txt file (or the first line 'prompt', if no prompt contains a comma)"
        )
    present = ", ".join(repr(name) for name in names[:12])
    return f"it has {present}; name one with --column {field}=NAME"


def describe_columns(tables: Sequence[OpenTable], columns: Mapping[str, str]) -> Iterator[str]:
    """Yield notices about columns that are renamed, resemble a field, or are also in the path of their file.

    `columns` maps fields to the user's column names, '' for no column.
    """
    for table in tables:
        if renamed := table.reader.renamed:
            pairs = [f"another {old!r} is carried as {new!r}" for new, old in list(renamed.items())[:MAX_SHOWN_COLUMNS]]
            more = f" and {len(renamed) - MAX_SHOWN_COLUMNS:,} more" if len(renamed) > MAX_SHOWN_COLUMNS else ""
            yield f"{table.file.name} has columns with the same name: {', '.join(pairs)}{more}"
        options = [f"--{name}" for name in table.carried if name in table.reader.schema.names]
        if table.file.format == ".prompts.txt" and options:
            yield f"{table.file.name}: options without effect, whose values are carried: {', '.join(options)}"
    yield from _describe_near_fields(tables, columns)
    overlaps = [
        (table.file.name, name) for table in tables for name in table.path_columns if name in table.reader.schema.names
    ]
    if overlaps:
        file, name = overlaps[0]
        files, names = map(set, zip(*overlaps, strict=True))
        more = f" (columns: {len(names):,}, files: {len(files):,})" if overlaps[1:] else ""
        yield f"{file}: column {name!r} is also in the path of the file, and the value in the path is used{more}"


def _describe_near_fields(tables: Iterable[OpenTable], columns: Mapping[str, str]) -> Iterator[str]:
    """Yield a hint for each carried column that seems to be a field that its table lacks."""
    files: dict[tuple[str, str], list[str]] = {}
    for table in tables:
        missing = [field for field in FIELDS if field not in table.fields and columns.get(field) != ""]
        for field, name in _match_near(missing, table.carried):
            files.setdefault((field, name), []).append(table.file.name)
    for (field, name), names in files.items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        option = f"--column {shlex.quote(f'{field}={name}')}"
        yield f"{names[0]}{more}: column {name!r} is carried and has no effect; if it is the {field}, add {option}"


def describe_unused_loras(tables: Iterable[OpenTable]) -> Iterator[str]:
    """Yield a hint if a table seems to name LoRAs, but there is no folder of LoRAs."""
    files = [table.file.name for table in tables if LORA_FIELD in table.carried]
    if files:
        more = f" and {len(files) - 1} more" if files[1:] else ""
        yield (
            f"{files[0]}{more}: column {LORA_FIELD!r} is carried and has no effect; if it names the LoRAs of rows, add "
            "--lora-folder DIR"
        )


def _match_near(missing: list[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each missing field that has a column with a similar name, and the first such column."""
    keys = {name: _normalize(name) for name in names}
    for field in missing:
        target = _normalize(field)
        matches = [name for name, key in keys.items() if key == target or key in SYNONYMS.get(field, ())]
        if not matches and len(target) >= MIN_FUZZY_LENGTH:
            matches = [
                name
                for name, key in keys.items()
                if len(key) >= MIN_FUZZY_LENGTH
                and key[0] == target[0]
                and difflib.SequenceMatcher(None, key, target).ratio() >= MIN_SIMILARITY
            ]
        if matches:
            yield field, matches[0]


def _normalize(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()
