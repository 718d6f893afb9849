"""All tables of a run as one stream of requests, in input order."""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from batch_infer.errors import TableError
from batch_infer.records import PromptRequest, ResultRow, Source
from batch_infer.settings import FIELDS, TableSettings
from batch_infer.table.files import TableFile, find_files, stems_that_meet
from batch_infer.table.readers import RawRow, read_rows, read_schema
from batch_infer.table.rows import Cells, RowRules, invalid, is_empty, requests
from batch_infer.table.text import clean


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which column of a file holds which field, and under which name the others are carried."""

    fields: Mapping[str, str]
    carried: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file with its layout, or with the reason why it cannot be read."""

    file: TableFile
    schema: pa.Schema | None
    layout: _Layout | None
    error: str | None = None


class Tables:
    """The tables of a run. `carried` is the schema of the columns that are handed through to the results."""

    def __init__(self, settings: TableSettings, result_columns: Iterable[str]) -> None:
        """Opens every file's header. Raises TableError where no file can be read, or default ids would meet."""
        self._limit = settings.limit
        self._reserved = frozenset(result_columns)
        self._files = [self._open(file, settings.columns) for file in find_files(settings.tables)]
        broken = [opened.error for opened in self._files if opened.error]
        if len(broken) == len(self._files):
            raise TableError("\n".join(broken))
        self._refuse_meeting_ids()
        self.carried = self._carried_schema()

    @property
    def files(self) -> list[str]:
        return [opened.file.name for opened in self._files]

    def rows(self, rules: RowRules) -> Iterator[PromptRequest | ResultRow]:
        """Every row, in input order, as its requests or as its invalid result."""
        with closing(_Ids()) as ids:
            for cells, error in islice(self._cells(ids), self._limit):
                if error is None:
                    yield from requests(cells, rules)
                else:
                    yield invalid(cells, error)

    def _open(self, file: TableFile, columns: Mapping[str, str]) -> _Opened:
        try:
            schema = read_schema(file)
            return _Opened(file, schema, self._layout(file, schema.names, columns))
        except TableError as error:
            return _Opened(file, None, None, str(error))

    def _layout(self, file: TableFile, names: list[str], columns: Mapping[str, str]) -> _Layout:
        fields = {}
        for field in FIELDS:
            name = columns.get(field, field)
            if name and name in names:
                fields[field] = name
            elif field == "prompt" or (name and field in columns):
                raise TableError(f"{file.name} has no column {name!r}{_unless(name, field)}; {_advice(field, names)}")
        carried: dict[str, str] = {}
        for name in names:
            if name not in fields.values():
                carried[name] = self._carried_name(name, names)
        return _Layout(fields, carried)

    def _carried_name(self, name: str, names: list[str]) -> str:
        while name in self._reserved:
            name = f"input_{name}"
            while name in names:  # the table has such a column of its own
                name = f"input_{name}"
        return name

    def _refuse_meeting_ids(self) -> None:
        meeting = stems_that_meet(opened.file for opened in self._files)
        for opened in self._files:
            if opened.layout and opened.file.stem in meeting and "id" not in opened.layout.fields:
                twins = [other.file.name for other in self._files if other.file.stem == opened.file.stem]
                raise TableError(
                    f"{' and '.join(twins)} would give their rows the same ids ({opened.file.default_id(0)}, ...): "
                    "rename one, name the folder that holds them, or add an id column"
                )

    def _carried_schema(self) -> pa.Schema:
        """One type a column: the widest of all files', text where they cannot meet."""
        types: dict[str, pa.DataType] = {}
        for opened in self._files:
            if opened.schema is None or opened.layout is None:
                continue
            for name, carried in opened.layout.carried.items():
                found = _plain(opened.schema.field(name).type)
                types[carried] = _common(types[carried], found) if carried in types else found
        return pa.schema(list(types.items()))

    def _cells(self, ids: _Ids) -> Iterator[tuple[Cells, str | None]]:
        for opened in self._files:
            if opened.layout is None:
                source = Source(opened.file.name, 0)
                yield Cells(ids.own(opened.file.default_id(0)), source, {}, {}), opened.error
                continue
            for raw in read_rows(opened.file):
                yield self._row(opened.file, opened.layout, raw, ids)

    def _row(self, file: TableFile, layout: _Layout, raw: RawRow, ids: _Ids) -> tuple[Cells, str | None]:
        found = {field: raw.cells.get(name) for field, name in layout.fields.items()}
        fields = {field: None if is_empty(value) else value for field, value in found.items()}
        carried = {new: self._as_carried(raw.cells.get(old), new) for old, new in layout.carried.items()}
        own = _id_text(fields.pop("id", None))
        error = raw.error
        if own is None:
            name = ids.own(file.default_id(raw.number))
        elif "\0" in own or clean(own) != own:
            name, error = ids.own(file.default_id(raw.number)), error or "the id is not UTF-8 text"
        elif not ids.add(own):
            name, error = ids.own(file.default_id(raw.number)), error or f"the id {own!r} stands twice"
        else:
            name = own
        return Cells(name, Source(file.name, raw.number), fields, carried), error

    def _as_carried(self, value: Any, name: str) -> Any:
        """A value in the column's common type: where files disagree that is a real number, or text."""
        kind = self.carried.field(name).type
        if value is None or isinstance(value, str):
            return value
        if pa.types.is_string(kind):
            return str(value)
        return float(value) if pa.types.is_float64(kind) else value


class _Ids:
    """The ids that were given out, on disk: memory does not grow with the table."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # sqlite's own temporary file, removed by closing
        self._database.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")

    def add(self, name: str) -> bool:
        """Give an id out; False where it was given out before."""
        return self._database.execute("INSERT OR IGNORE INTO ids VALUES (?)", (name,)).rowcount == 1

    def own(self, name: str) -> str:
        """Give this id out, or, where a row above has taken it for its own, the next like it."""
        while not self.add(name):
            name += "+"
        return name

    def close(self) -> None:
        self._database.close()


def _id_text(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers that once held an empty cell
        value = int(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return None if value is None else str(value)


def _unless(name: str, field: str) -> str:
    return "" if name == field else f" for {field}"


def _advice(field: str, names: list[str]) -> str:
    near = next((name for name in names if name.strip().lower() == field), None)
    found = ", ".join(repr(name) for name in names[:12])
    if near is not None:
        return f"try --column {shlex.quote(f'{field}={near}')}"
    if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
        return f"its columns seem to be separated by {mark!r}: save it with commas, or as Parquet"
    return f"it has {found}; name one with --column {field}=NAME"


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def _common(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """A type that holds every value of both."""
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
