"""Read JSON documents: arrays of objects or prompts, and Azure ML payloads in pandas' "split" form."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from batch_infer.errors import RowError, TableError
from batch_infer.table.base import (
    MAX_COLUMNS,
    RawRow,
    Reader,
    Scratch,
    TableFile,
    format_error,
    is_utf8,
    make_short_row_notice,
    rename_duplicates,
)
from batch_infer.table.jsonl import open_jsonl, open_objects
from batch_infer.table.scanner import Scanner
from batch_infer.table.streams import BUFFER, open_bytes

ACCEPTED_FORMS = (
    'a .json file contains [{"prompt": ...}, ...], ["a prompt", ...] or '
    '{"input_data": {"columns": ["prompt"], "data": [...]}}, or one object with a prompt per line'
)
PAYLOAD_START = re.compile(rb'\s*\{\s*("input_data"|"(columns|data|index)"\s*:\s*\[|"parameters"\s*:\s*\{)')
"""Matches the start of an Azure ML payload whose first key is on the first line."""
PAYLOAD_KEY = re.compile(rb'"(input_data|columns|data)"\s*:')
MAX_COMPLETE_BYTES = 4000
"""A first line that is longer than this and fails to parse may be valid but cut off by `BufferedReader.peek`."""


@dataclass(frozen=True, slots=True)
class DocumentFormat:
    """The layout of a document.

    `columns` contains the names of the cells of a row that is a list or a bare prompt. `parameters` contains the
    values of missing and null cells, by column.
    """

    is_payload: bool
    columns: tuple[str, ...]
    parameters: dict[str, Any] = field(default_factory=dict)


def parse_payload_columns(values: Sequence[Any]) -> tuple[str, ...]:
    """Return the names in a payload's `columns`. Raises RowError for duplicates or too many names."""
    if len(values) > MAX_COLUMNS:
        raise RowError(f"there are more than {MAX_COLUMNS}")
    if duplicates := [name for name, count in Counter(map(str, values)).items() if count > 1]:
        raise RowError(f"two are named {duplicates[0]!r}")
    return tuple(map(str, values))


def parse_element(element: Any, document: DocumentFormat) -> dict[str, Any]:
    """Return the cells of a row by column. Raises RowError if the element is not a valid row."""
    if isinstance(element, dict):
        cells = element
    elif isinstance(element, str):
        cells = {document.columns[0]: element}
    elif isinstance(element, list) and document.is_payload:
        if len(element) > len(document.columns):
            raise RowError(f"has {len(element)} cells, but the number of columns is {len(document.columns)}")
        cells = dict(zip(document.columns, element, strict=False))
    else:
        raise RowError(f"is neither an object nor a prompt but {type(element).__name__}")
    if document.parameters:
        cells = {**document.parameters, **{name: value for name, value in cells.items() if value is not None}}
    return cells


def open_json(file: TableFile, prompt_column: str, scratch: Scratch) -> Reader:
    """Open a JSON file and find its format and columns.

    Raises OSError, StorageError, and TableError if the form is not supported or no row can be read.
    """
    if _is_json_lines(file, prompt_column):
        return open_jsonl(file, prompt_column, scratch)
    document, renamed = _read_format(file, prompt_column or "prompt")
    columns = (*document.columns, *document.parameters) if document.is_payload else ()
    return open_objects(file, lambda: _read_elements(file, document), columns, renamed)


def _is_json_lines(file: TableFile, prompt_column: str) -> bool:
    """Return whether a .json file contains JSON Lines, as written by Spark and `datasets.to_json`.

    The second line of a document starts with a key, and the second line of JSON Lines with another object. A single
    line is JSON Lines if it has a prompt or, if it is too long to parse here, no key of a payload. Only the start of
    the file is read, since a document may be one long line. Raises OSError, StorageError, and TableError for UTF-16.
    """
    with open_bytes(file) as stream:
        start = stream.peek(BUFFER)
    first, *rest = [line for line in start.split(b"\n") if line.strip()] or [b""]
    if not first.lstrip().startswith(b"{") or PAYLOAD_START.match(first):
        return False
    if rest:
        return rest[0].lstrip().startswith(b"{")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return len(first) > MAX_COMPLETE_BYTES and not PAYLOAD_KEY.search(first)
    return isinstance(value.get(prompt_column), str)


def _read_format(file: TableFile, prompt_column: str) -> tuple[DocumentFormat, dict[str, str]]:
    """Return the format of a document, and the original names of renamed columns."""
    with open_bytes(file) as stream:
        scanner = Scanner(stream)
        match scanner.peek():
            case "[":
                return DocumentFormat(False, (prompt_column,)), {}
            case "{":
                return _read_payload_format(file, scanner, prompt_column)
            case "":
                raise TableError(f"{file.name} is empty")
            case _:
                raise TableError(f"{file.name} is not a supported table: {ACCEPTED_FORMS}")


def _read_payload_format(
    file: TableFile, scanner: Scanner, prompt_column: str
) -> tuple[DocumentFormat, dict[str, str]]:
    """Return the format of a payload, whose keys may have any order, and the original names of renamed columns."""
    document, renamed = DocumentFormat(True, ()), dict[str, str]()
    has_rows, error = False, ""
    try:
        for key in _read_payload_keys(scanner):
            match key, scanner.peek():
                case "columns", "[":
                    names, renamed = rename_duplicates(list(map(str, scanner.read_value())))
                    document = replace(document, columns=parse_payload_columns(names))
                case "parameters", "{":
                    document = replace(document, parameters=scanner.read_value())
                case _, character:
                    has_rows = has_rows or (key == "data" and character == "[")
                    scanner.skip_value()
    except OSError as exc:
        error = format_error(exc)  # if the columns are known, the rows before the damage can be read
    except RowError as exc:
        raise TableError(f"{file.name} cannot be read: its columns or parameters: {exc}") from exc
    if not has_rows or (error and not document.columns):
        reason = f"cannot be read: {error}" if error else f"is not a supported table: {ACCEPTED_FORMS}"
        raise TableError(f"{file.name} {reason}")
    if not all(map(is_utf8, (*document.columns, *document.parameters))):
        raise TableError(f"{file.name} has a column whose name is not UTF-8; save it as UTF-8")
    return document if document.columns else replace(document, columns=(prompt_column,)), renamed


def _read_payload_keys(scanner: Scanner) -> Iterator[str]:
    """Yield the keys of a payload, at the top level or inside `input_data`. The caller must consume each value."""
    for key in scanner.read_keys():
        if key == "input_data" and scanner.peek() == "{":
            yield from scanner.read_keys()
        else:
            yield key


def _read_elements(file: TableFile, document: DocumentFormat) -> Iterator[RawRow]:
    with open_bytes(file) as stream:
        scanner = Scanner(stream)
        for row_number, _ in enumerate(_find_elements(scanner, document)):
            yield _make_row(row_number, scanner.read_value(), document)
        scanner.read_end()


def _find_elements(scanner: Scanner, document: DocumentFormat) -> Iterator[None]:
    """Yield before each row. The caller must consume the row."""
    if not document.is_payload:
        yield from scanner.find_elements()
        return
    for key in _read_payload_keys(scanner):
        if key == "data" and scanner.peek() == "[":
            yield from scanner.find_elements()
        else:
            scanner.skip_value()


def _make_row(row_number: int, element: Any, document: DocumentFormat) -> RawRow:
    try:
        cells = parse_element(element, document)
    except RowError as error:
        return RawRow(row_number, {}, f"element {row_number} {error}")
    is_short = isinstance(element, list) and len(element) < len(document.columns)
    return RawRow(row_number, cells, notice=make_short_row_notice(len(element), document.columns) if is_short else None)
