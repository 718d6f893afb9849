"""Plain text: one prompt a line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from batch_infer.errors import RowError, TableError
from batch_infer.table.endings import TableFile
from batch_infer.table.raw import RawRow, broken
from batch_infer.table.streams import Lines, open_bytes, open_text

COLUMN = "prompt"


@dataclass(frozen=True, slots=True)
class Plain:
    file: TableFile

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(COLUMN, pa.string())])

    def rows(self) -> Iterator[RawRow]:
        number = 0
        try:
            with open_text(self.file, newline=None) as stream:
                lines = Lines(stream)
                while True:
                    try:
                        row = RawRow(number, {COLUMN: next(lines).removesuffix("\n")})
                    except StopIteration:
                        return
                    except RowError as error:
                        row = RawRow(number, {}, f"line {lines.number} {error}")
                    if row.error or row.cells[COLUMN].strip():
                        yield row
                        number += 1
        except OSError as error:
            yield broken(number, error)


def open_plain(file: TableFile) -> Plain:
    """Raises OSError and TableError."""
    with open_bytes(file) as stream:
        if not stream.peek(1):
            raise TableError(f"{file.name} is empty")
    return Plain(file)
