"""A row as its file has it, and what every format's reader gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from batch_infer.table.endings import TableFile
from batch_infer.table.notes import Note
from batch_infer.table.streams import reason, refuse_storage_fault


class RawRow(NamedTuple):
    """A row of a file, counted from 0; `error` says why it could not be read. A tuple: there are millions of them.

    `line` is that of a text file, from 1. A row whose `note` says that it is blank is none.
    """

    number: int
    cells: Mapping[str, Any]
    error: str | None = None
    line: int | None = None
    note: Note | None = None


class Reader(Protocol):
    """An opened file: its columns are known, and it can be walked again and again."""

    @property
    def schema(self) -> pa.Schema: ...

    def rows(self) -> Iterator[RawRow]:
        """The rows in their order. A fault in a row is that row's; a file that breaks off ends with one saying so."""
        ...


def broken(file: TableFile, number: int, error: Exception) -> RawRow:
    """The last row of a file that breaks off. Raises StorageError where the file may be whole."""
    refuse_storage_fault(error, file.name, was_opened=True)
    return RawRow(number, {}, f"the file breaks off here: {reason(error)}")
