"""CSV and TSV, by the standard library's csv: a fault costs its own row, and the next one is read."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO

import pyarrow as pa

from batch_infer.errors import RowError, TableError
from batch_infer.table.endings import TableFile
from batch_infer.table.names import distinct_names
from batch_infer.table.notes import Note, short_row
from batch_infer.table.raw import RawRow, broken
from batch_infer.table.streams import LONGEST, Lines, open_text
from batch_infer.table.text import is_utf8

DECLARATION = re.compile(r'"?sep=(?P<mark>[^"\r\n])"?\r?\n?', re.IGNORECASE)
MARKS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""What may stand between cells: spreadsheets write semicolons where the comma is in the numbers."""

csv.field_size_limit(LONGEST)  # which the limit of a row comes before


@dataclass(frozen=True, slots=True)
class Delimited:
    """`header` has a name for each column, `renamed` the file's own name of each that has another there.

    `is_declared`: the first line is `sep=;`, by which spreadsheets say what is between cells.
    """

    file: TableFile
    mark: str
    header: tuple[str, ...]
    renamed: Mapping[str, str]
    is_declared: bool = False

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in self.header])

    def rows(self) -> Iterator[RawRow]:
        number = 0
        try:
            with open_text(self.file, newline="") as stream:
                lines = _Lines(stream)
                if self.is_declared:
                    next(lines)
                reader = csv.reader(lines, strict=True, delimiter=self.mark)
                _header(reader)
                while True:
                    lines.mark()
                    starts = lines.number + 1
                    try:
                        cells = next(reader)
                    except StopIteration:
                        return
                    except (csv.Error, RowError) as error:
                        if len(self.header) > 1 or _ran_on(error):
                            lines.give_back(self._rows_within(lines.taken))
                        yield RawRow(number, {}, _fault(starts, lines.number, error), starts)
                        number += 1
                        continue
                    if cells:  # a blank line has none
                        yield self._row(number, cells, starts, lines.number)
                        number += 1
        except OSError as error:
            yield broken(self.file, number, error)

    def _rows_within(self, broken: list[str]) -> int:
        """How many lines of a row that cannot be read are none of its own.

        A quote that is left open swallows the rows below it. The first line that is a whole row by itself ends it.
        (Of one column every line is a row; it is asked only where the quote was never closed.)
        """
        for place, line in enumerate(broken[1:], 1):
            if line.count('"') % 2 == 0:
                with suppress(csv.Error):
                    if len(next(csv.reader([line], strict=True, delimiter=self.mark))) == len(self.header):
                        return len(broken) - place
        return 0

    def _row(self, number: int, cells: list[str], first: int, last: int) -> RawRow:
        error, note = None, None
        width = len(self.header)
        if len(cells) > 1 and not any(cells):
            return RawRow(number, {}, None, first, Note("blank"))
        if len(cells) > width and any(cells[width:]):
            error = (
                f"{_at(first, last)} has {len(cells)} cells where the header names {width}; "
                f"quote cells that hold {MARKS.get(self.mark, repr(self.mark))}"
            )
        elif len(cells) < width:  # some spreadsheets leave out the last cells where they are empty
            note = short_row(len(cells), self.header)
        # strict=False also covers the overlong row, which is refused.
        return RawRow(number, dict(zip(self.header, cells, strict=False)), error, first, note)


class _TooLong(RowError):
    """A row of several lines, each of which is short enough."""


class _Lines(Lines):
    """Lines of which the last ones can come again; `taken` are those since `mark`.

    Where they are too long together, `_TooLong` is raised: memory is bounded by what a row may have.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._returned: list[str] = []
        self._size = 0
        self.taken: list[str] = []

    def __next__(self) -> str:
        if self._returned:
            line = self._returned.pop()
            self.number += 1
        else:
            line = super().__next__()
        self.taken.append(line)
        self._size += len(line)
        if self._size > self.longest:
            raise _TooLong(f"begins a row of more than {self.longest} characters; is a quote left open?")
        return line

    def mark(self) -> None:
        self.taken.clear()
        self._size = 0

    def give_back(self, count: int) -> None:
        self._returned += reversed(self.taken[len(self.taken) - count :])
        self.number -= count


def open_delimited(file: TableFile, prompt: str) -> Delimited:
    """Find out what stands between the cells: for .csv the comma, or what makes a prompt column of the header.

    Where nothing does, what makes the most columns: its names are what the user is shown.

    Raises OSError, csv.Error and TableError.
    """
    declared = _declared_mark(file)
    marks = [declared] if declared else ["\t"] if file.format == ".tsv" else list(MARKS)
    headers: dict[str, list[str]] = {}
    fault = None
    for mark in marks:
        try:
            headers[mark] = _read_header(file, mark, is_declared=bool(declared))
        except csv.Error as error:  # a quoted header is none to one who looks for another mark
            fault = fault or error
            continue
        if prompt in headers[mark]:
            break
    if fault and not headers:
        raise fault
    mark = max(headers, key=lambda mark: (prompt in headers[mark], len(headers[mark])))
    header, renamed = _named(file, headers[mark])
    return Delimited(file, mark, header, renamed, bool(declared))


def _declared_mark(file: TableFile) -> str | None:
    """What the first line says is between cells: spreadsheets write `sep=;` there, and obey it."""
    with open_text(file, newline="") as stream:
        found = DECLARATION.fullmatch(stream.readline(20))
    return found["mark"] if found else None


def _read_header(file: TableFile, mark: str, *, is_declared: bool) -> list[str]:
    with open_text(file, newline="") as stream:
        lines = _lines(file, stream)
        if is_declared:
            next(lines)
        return _header(csv.reader(lines, strict=True, delimiter=mark))


def _lines(file: TableFile, stream: TextIO) -> Iterator[str]:
    lines = _Lines(stream)
    try:
        yield from lines
    except RowError as error:
        fault = f"{file.name} has a header that is longer than {lines.longest} characters; is it a table?"
        raise TableError(fault) from error


def _named(file: TableFile, header: list[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The header with a name for each column, and the names that stand twice in the file.

    Spreadsheets' trailing commas and pandas' index have no name.
    """
    if not all(map(is_utf8, header)):
        raise TableError(f"{file.name} has a header that is not UTF-8; save it as UTF-8")
    names = list(header)
    for position, name in enumerate(header):
        if not name:
            names[position] = f"unnamed_{position}"
            while names[position] in header:
                names[position] += "_"
    distinct, renamed = distinct_names(names)
    return tuple(distinct), renamed


def _header(reader: Any) -> list[str]:
    return next((cells for cells in reader if cells), [])


def _ran_on(error: Exception) -> bool:
    """Whether a quote was never closed: the file ended, or the row grew too long, before another came."""
    return isinstance(error, _TooLong) or str(error).startswith("unexpected end of data")


def _fault(first: int, last: int, error: Exception) -> str:
    where = _at(first, first if isinstance(error, _TooLong) else last)
    if isinstance(error, RowError):
        return f"{where} {error}"
    return f"{where} cannot be read as CSV: {error}; is a quote left open?"


def _at(first: int, last: int) -> str:
    return f"line {first}" if first >= last else f"lines {first} to {last}"
