"""JSON documents: an array of objects or prompts, and the payloads of Azure ML, which are pandas' "split" form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from batch_infer.errors import RowError, TableError
from batch_infer.table.columns import Columns, checked
from batch_infer.table.endings import TableFile
from batch_infer.table.names import distinct_names
from batch_infer.table.notes import Note, short_row
from batch_infer.table.raw import RawRow, broken
from batch_infer.table.scanner import BrokenDocument, Scanner
from batch_infer.table.shape import DocumentFormat, element_cells, payload_columns
from batch_infer.table.streams import open_bytes, reason
from batch_infer.table.text import is_utf8

SHAPES = (
    'a .json holds [{"prompt": ...}, ...], ["a prompt", ...] or '
    '{"input_data": {"columns": ["prompt"], "data": [...]}}, or one object with a prompt a line'
)


@dataclass(frozen=True, slots=True)
class Document:
    file: TableFile
    shape: DocumentFormat
    schema: pa.Schema
    renamed: Mapping[str, str]

    def rows(self) -> Iterator[RawRow]:
        known = frozenset(self.schema.names)
        for row in _walk(self.file, self.shape):
            yield row if row.error else checked(row, f"element {row.number}", known)


def open_document(file: TableFile, prompt: str) -> Document:
    """Find out shape and columns, by a walk over the file. Raises OSError, and TableError where it holds no row."""
    with open_bytes(file) as stream:
        scanner = Scanner(stream)
        renamed: Mapping[str, str] = {}
        match scanner.peek():
            case "[":
                shape = DocumentFormat(payload=False, columns=(prompt or "prompt",))
            case "{":
                shape, renamed = _payload(file, scanner, prompt or "prompt")
            case "":
                raise TableError(f"{file.name} is empty")
            case _:
                raise TableError(f"{file.name} is no table: {SHAPES}")
    columns = Columns([*shape.columns, *shape.parameters] if shape.payload else [])
    fault, readable = None, False
    for row in _walk(file, shape):
        columns.add(row.cells)
        fault, readable = fault or row.error, readable or not row.error
    if fault and not readable:
        raise TableError(f"{file.name} cannot be read: {fault}")
    return Document(file, shape, columns.schema(), renamed)


def _payload(file: TableFile, scanner: Scanner, prompt: str) -> tuple[DocumentFormat, Mapping[str, str]]:
    """The shape of a payload, whose keys come in any order, and the columns that it names twice."""
    shape, renamed = DocumentFormat(payload=True, columns=()), dict[str, str]()
    has_rows, fault = False, ""
    try:
        for key in _members(scanner):
            match key, scanner.peek():
                case "columns", "[":
                    names, renamed = distinct_names(list(map(str, scanner.value())))
                    shape = replace(shape, columns=payload_columns(names))
                case "parameters", "{":
                    shape = replace(shape, parameters=scanner.value())
                case _, mark:
                    has_rows = has_rows or (key == "data" and mark == "[")
                    scanner.skip()
    except (OSError, BrokenDocument) as error:
        fault = reason(error)  # the rows before the break can be read, once the columns are known
    except RowError as error:
        raise TableError(f"{file.name} cannot be read: its columns or parameters: {error}") from error
    if not has_rows or (fault and not shape.columns):
        raise TableError(f"{file.name} cannot be read: {fault}" if fault else f"{file.name} is no table: {SHAPES}")
    if not all(map(is_utf8, (*shape.columns, *shape.parameters))):
        raise TableError(f"{file.name} has a column whose name is not UTF-8; save it as UTF-8")
    return shape if shape.columns else replace(shape, columns=(prompt,)), renamed


def _members(scanner: Scanner) -> Iterator[str]:
    """The keys of a payload, within its `input_data` or without it."""
    for key in scanner.members():
        if key == "input_data" and scanner.peek() == "{":
            yield from scanner.members()
        else:
            yield key


def _walk(file: TableFile, shape: DocumentFormat) -> Iterator[RawRow]:
    number = 0
    try:
        with open_bytes(file) as stream:
            scanner = Scanner(stream)
            for _ in _elements(scanner, shape):
                element = scanner.value()
                try:
                    row = RawRow(number, element_cells(element, shape), note=_note(element, shape))
                except RowError as error:
                    row = RawRow(number, {}, f"element {number} {error}")
                yield row
                number += 1
            scanner.end()
    except (OSError, BrokenDocument) as error:
        yield broken(file, number, error)


def _note(element: Any, shape: DocumentFormat) -> Note | None:
    """What to say of a row that is a list shorter than the columns."""
    if not isinstance(element, list) or len(element) >= len(shape.columns):
        return None
    return short_row(len(element), shape.columns)


def _elements(scanner: Scanner, shape: DocumentFormat) -> Iterator[None]:
    """Stops before each row."""
    if not shape.payload:
        yield from scanner.elements()
        return
    for key in _members(scanner):
        if key == "data" and scanner.peek() == "[":
            yield from scanner.elements()
        else:
            scanner.skip()
