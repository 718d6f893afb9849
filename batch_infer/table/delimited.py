"""Read CSV and TSV with the standard library's csv module, and continue after unreadable rows."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO

import pyarrow as pa

from batch_infer.errors import RowError, TableError
from batch_infer.table.base import (
    BLANK_ROW,
    SEPARATORS,
    Notice,
    RawRow,
    Reader,
    Scratch,
    TableFile,
    is_utf8,
    make_short_row_notice,
    rename_duplicates,
)
from batch_infer.table.streams import MAX_ROW_SIZE, LineReader, open_text

SEPARATOR_DECLARATION = re.compile(r'"?sep=(?P<separator>[^"\r\n])"?\r?\n?', re.IGNORECASE)
"""Matches a first line in which a spreadsheet declares the separator."""

csv.field_size_limit(MAX_ROW_SIZE)  # Unlike csv's default limit, this is not reached before the row limit.


def open_delimited(file: TableFile, prompt_column: str, scratch: Scratch) -> Reader:
    """Open a CSV or TSV file. Raises OSError, csv.Error and TableError.

    If a .csv does not declare its separator, use the first in SEPARATORS with which the header has a prompt column, or
    else the one that gives the most columns, so that the error message shows their names.
    """
    with open_text(file, newline="") as stream:
        declaration = SEPARATOR_DECLARATION.fullmatch(stream.readline(20))
    defaults = ["\t"] if file.format == ".tsv" else list(SEPARATORS)
    headers: dict[str, list[str]] = {}
    error = None
    for separator in [declaration["separator"]] if declaration else defaults:
        try:
            headers[separator] = _read_header(file, separator)
        except csv.Error as exc:  # with the wrong separator, a quoted header may be malformed CSV
            error = error or exc
            continue
        if prompt_column in headers[separator]:
            break
    if error and not headers:
        raise error
    separator = max(headers, key=lambda separator: (prompt_column in headers[separator], len(headers[separator])))
    names, renamed = rename_duplicates(_name_columns(file, headers[separator]))
    schema = pa.schema([(name, pa.string()) for name in names])
    return Reader(file, schema, renamed, _DelimitedRows(file, names, separator).read)


def _read_header(file: TableFile, separator: str) -> list[str]:
    with open_text(file, newline="") as stream:
        lines = _CsvLines(stream, separator)
        with suppress(RowError):
            header = lines.read_header()
            if not lines.first_shortened:
                return header
    raise TableError(f"{file.name} has a header that is longer than {lines.max_length} characters; is it a table?")


def _name_columns(file: TableFile, header: list[str]) -> list[str]:
    """Name unnamed columns, such as those of trailing commas in spreadsheets and of the index in pandas."""
    if not all(map(is_utf8, header)):
        raise TableError(f"{file.name} has a header that is not UTF-8; save it as UTF-8")
    names = list(header)
    for index, name in enumerate(header):
        if not name:
            names[index] = f"unnamed_{index}"
            while names[index] in header:
                names[index] += "_"
    return names


@dataclass(frozen=True, slots=True)
class _DelimitedRows:
    """Reads the rows of a CSV or TSV file."""

    file: TableFile
    header: list[str]
    separator: str

    def read(self) -> Iterator[RawRow]:
        row_number = 0
        with open_text(self.file, newline="") as stream:
            lines = _CsvLines(stream, self.separator)
            lines.read_header()
            while True:
                lines.begin_row()
                try:
                    row = self._read_row(lines, row_number)
                except StopIteration:
                    return
                if row:
                    yield row
                    row_number += 1

    def _read_row(self, lines: _CsvLines, row_number: int) -> RawRow | None:
        """Return the next row, or None for a blank line. Raises StopIteration at the end of the file."""
        first = lines.number + 1
        try:
            cells = next(lines.reader)
        except (csv.Error, RowError) as error:
            is_unclosed = isinstance(error, RowError) or str(error).startswith("unexpected end of data")
            if is_unclosed or len(self.header) > 1:
                count = self._count_later_lines(lines.row_lines)
                lines.push_back(count)
                if isinstance(error, RowError) and not count:
                    self._skip_row(lines)
            return RawRow(row_number, {}, _describe(first, lines.number, error), first)
        if lines.first_shortened:
            message = f"line {lines.first_shortened} is longer than {lines.max_length} characters"
            if first < lines.number:
                message = f"{_format_lines(first, lines.number)} are a row in which {message}"
            return RawRow(row_number, {}, message, first)
        return self._make_row(row_number, cells, first, lines.number) if cells else None

    def _count_later_lines(self, lines: list[str]) -> int:
        """Return how many lines at the end of an unreadable row belong to later rows.

        An unclosed quote swallows the rows below it, so the next row starts at the first line that is a complete row.
        In a table with one column, nearly every line is a complete row, so this is only called for an unclosed quote.
        """
        return next((len(lines) - index for index in range(1, len(lines)) if self._is_row(lines[index])), 0)

    def _is_row(self, line: str) -> bool:
        """Return whether a line is a complete row."""
        if line.count('"') % 2 == 0:
            with suppress(csv.Error):
                return len(next(csv.reader([line], strict=True, delimiter=self.separator))) == len(self.header)
        return False

    def _skip_row(self, lines: _CsvLines) -> None:
        """Skip the rest of a row that is too long, up to its closing quote or to a line that is a complete row."""
        is_open = sum(line.count('"') for line in lines.row_lines) % 2 == 1
        while is_open:
            lines.begin_row()
            if (line := next(lines, None)) is None:
                return
            if self._is_row(line):
                lines.push_back(1)
                return
            is_open ^= line.count('"') % 2 == 1

    def _make_row(self, row_number: int, cells: list[str], first: int, last: int) -> RawRow:
        error, notice = None, None
        width = len(self.header)
        if len(cells) > 1 and not any(cells):
            return RawRow(row_number, {}, None, first, Notice(BLANK_ROW))
        if len(cells) > width and any(cells[width:]):
            separators = SEPARATORS.get(self.separator, repr(self.separator))
            error = (
                f"{_format_lines(first, last)} has {len(cells)} cells, but the header has {width}; "
                f"quote cells that contain {separators}"
            )
        elif len(cells) < width:  # some spreadsheets omit empty cells at the end of a row
            notice = make_short_row_notice(len(cells), self.header)
        # strict=False, since a row may have too few cells, or too many, which are empty or an error.
        return RawRow(row_number, dict(zip(self.header, cells, strict=False)), error, first, notice)


class _ShortenedLine(str):
    """A short replacement for a line that was too long."""


class _CsvLines(LineReader):
    """Reads lines and can push them back. `reader` parses them, and `row_lines` contains the lines since `begin_row`.

    To bound memory, raises RowError if the lines of a row are too long in total. A single line that is too long is
    shortened without changing where its row ends. `first_shortened` is the number of the row's first such
    line, or 0.
    """

    def __init__(self, stream: TextIO, separator: str) -> None:
        super().__init__(stream)
        self.reader = csv.reader(self, strict=True, delimiter=separator)
        self._words = re.compile(rf'[^"{re.escape(separator)}\r\n]+')
        self._pushed_back: list[str] = []
        self.row_lines: list[str] = []
        self._size = self.first_shortened = 0

    def __next__(self) -> str:
        if self._pushed_back:
            line = self._pushed_back.pop()
            self.number += 1
        else:
            line = super().__next__()
        self.row_lines.append(line)
        if line.__class__ is _ShortenedLine:
            self.first_shortened = self.first_shortened or self.number
        self._size += len(line)
        if self._size > self.max_length:
            raise RowError(f"a row of more than {self.max_length} characters; is there an unclosed quote?")
        return line

    def shorten(self, pieces: Iterator[str]) -> str:
        """Return the line with each text between quotes and separators replaced by one letter.

        If that is still too long, return one quote if the line has an odd number of quotes, else ''. Whether the next
        line starts inside a quoted cell stays the same.
        """
        text, quotes = "", 0
        for piece in pieces:
            quotes += piece.count('"')
            if len(text) <= self.max_length:
                text += self._words.sub("x", piece)
        return _ShortenedLine(text if len(text) <= self.max_length else '"' * (quotes % 2))

    def read_header(self) -> list[str]:
        """Skip a line that declares the separator, if any, and return the first nonblank row, or [] if none."""
        if not SEPARATOR_DECLARATION.fullmatch(next(self, "")):
            self.push_back(len(self.row_lines))
        self.begin_row()
        return next(filter(None, self.reader), [])

    def begin_row(self) -> None:
        self.row_lines.clear()
        self._size = 0
        self.first_shortened = 0

    def push_back(self, count: int) -> None:
        """Push back the last `count` lines, to be read again."""
        self._pushed_back += reversed(self.row_lines[len(self.row_lines) - count :])
        self.number -= count


def _describe(first: int, last: int, error: Exception) -> str:
    if isinstance(error, RowError):
        return f"{_format_lines(first, last)} {'begins' if first >= last else 'are'} {error}"
    return f"{_format_lines(first, last)} cannot be read as CSV: {error}; is there an unclosed quote?"


def _format_lines(first: int, last: int) -> str:
    return f"line {first}" if first >= last else f"lines {first} to {last}"
