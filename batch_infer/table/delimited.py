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

csv.field_size_limit(LONGEST)  # The row limit applies first.


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
                lines = _Lines(stream, self.mark)
                if self.is_declared:
                    next(lines)
                reader = csv.reader(lines, strict=True, delimiter=self.mark)
                _header(reader)
                while True:
                    lines.mark()
                    try:
                        row = self._read_row(reader, lines, number)
                    except StopIteration:
                        return
                    if row:
                        yield row
                        number += 1
        except OSError as error:
            yield broken(self.file, number, error)

    def _read_row(self, reader: Any, lines: _Lines, number: int) -> RawRow | None:
        """Return the next row, or None for a blank line. Raises StopIteration at the end of the file."""
        first = lines.number + 1
        try:
            cells = next(reader)
        except (csv.Error, RowError) as error:
            if len(self.header) > 1 or _ran_on(error):
                lines.give_back(count := self._rows_within(lines.taken))
                if isinstance(error, RowError) and not count:
                    self._skip_row(lines)
            return RawRow(number, {}, _fault(first, lines.number, error), first)
        if lines.shortened:
            return RawRow(number, {}, _too_long(first, lines), first)
        return self._row(number, cells, first, lines.number) if cells else None

    def _rows_within(self, broken: list[str]) -> int:
        """How many lines of a row that cannot be read are none of its own.

        A quote that is left open swallows the rows below it. The first line that is a whole row by itself ends it.
        (Of one column every line is a row; it is asked only where the quote was never closed.)
        """
        return next((len(broken) - place for place, line in enumerate(broken) if place and self._is_row(line)), 0)

    def _is_row(self, line: str) -> bool:
        """Return whether a line is a whole row by itself."""
        if line.count('"') % 2 == 0:
            with suppress(csv.Error):
                return len(next(csv.reader([line], strict=True, delimiter=self.mark))) == len(self.header)
        return False

    def _skip_row(self, lines: _Lines) -> None:
        """Skip the rest of a row that is too long, up to its closing quote or to a line that is a row by itself."""
        is_open = sum(line.count('"') for line in lines.taken) % 2 == 1
        while is_open:
            lines.mark()
            try:
                line = next(lines)
            except StopIteration:
                return
            if self._is_row(line):
                lines.give_back(1)
                return
            is_open ^= line.count('"') % 2 == 1

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


class _Lines(Lines):
    """Lines of which the last ones can be read again. `taken` has those since `mark`.

    Memory is bounded by what a row may have: RowError is raised where lines are too long together. A line that is too
    long by itself is shortened, so that the row ends where it would end otherwise. `shortened` is the number of the
    first such line since `mark`, or 0.
    """

    def __init__(self, stream: TextIO, mark: str) -> None:
        super().__init__(stream)
        self._words = re.compile(rf'[^"{re.escape(mark)}\r\n]+')
        self._returned: list[str] = []
        self._size = 0
        self.taken: list[str] = []
        self.shortened = 0

    def __next__(self) -> str:
        if self._returned:
            line = self._returned.pop()
            self.number += 1
        else:
            line = super().__next__()
        self.taken.append(line)
        if line.__class__ is _Shortened:
            self.shortened = self.shortened or self.number
        self._size += len(line)
        if self._size > self.longest:
            raise RowError(f"a row of more than {self.longest} characters; is there an unclosed quote?")
        return line

    def too_long(self, pieces: Iterator[str]) -> str:
        """Return a line with one letter for each word between quotes and marks.

        If that is too long too, only an unpaired quote is kept: the next line still is inside or outside of a cell.
        """
        text, quotes = "", 0
        for piece in pieces:
            quotes += piece.count('"')
            if len(text) <= self.longest:
                text += self._words.sub("x", piece)
        return _Shortened(text if len(text) <= self.longest else '"' * (quotes % 2))

    def mark(self) -> None:
        self.taken.clear()
        self._size = 0
        self.shortened = 0

    def give_back(self, count: int) -> None:
        self._returned += reversed(self.taken[len(self.taken) - count :])
        self.number -= count


class _Shortened(str):
    """A line that was too long."""


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
        lines = _Lines(stream, mark)
        with suppress(RowError):
            if is_declared:
                next(lines)
            header = _header(csv.reader(lines, strict=True, delimiter=mark))
            if not lines.shortened:
                return header
    raise TableError(f"{file.name} has a header that is longer than {lines.longest} characters; is it a table?")


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
    return isinstance(error, RowError) or str(error).startswith("unexpected end of data")


def _fault(first: int, last: int, error: Exception) -> str:
    where = _at(first, last)
    if isinstance(error, RowError):
        return f"{where} {'begins' if first >= last else 'are'} {error}"
    return f"{where} cannot be read as CSV: {error}; is there an unclosed quote?"


def _too_long(first: int, lines: _Lines) -> str:
    message = f"line {lines.shortened} is longer than {lines.longest} characters"
    return message if first >= lines.number else f"{_at(first, lines.number)} are a row in which {message}"


def _at(first: int, last: int) -> str:
    return f"line {first}" if first >= last else f"lines {first} to {last}"
