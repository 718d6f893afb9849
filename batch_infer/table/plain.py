"""Plain text: one prompt a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from batch_infer.errors import RowError, TableError
from batch_infer.table.endings import TableFile
from batch_infer.table.notes import Note
from batch_infer.table.raw import RawRow, broken
from batch_infer.table.streams import Lines, open_bytes, open_text
from batch_infer.table.text import clean

COLUMN = "prompt"
NOT_A_PROMPT = re.compile(r"^\s*(#|//)|(^|\s)--[A-Za-z][\w-]*([\s=]|$)|\s-[A-Za-z][ =]?[0-9.]+(\s|$)")
"""Comments and options of other programs' prompt files: sd-scripts and AUTOMATIC1111 (`--steps 20`), Midjourney
(`--ar 16:9`), InvokeAI (`-s50`)."""
SHOWN = 60


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
                        prompt = next(lines).removesuffix("\n")
                    except StopIteration:
                        return
                    except RowError as error:
                        yield RawRow(number, {}, f"line {lines.number} {error}", lines.number)
                    else:
                        if not prompt.strip():
                            continue
                        yield RawRow(number, {COLUMN: prompt}, None, lines.number, _note(prompt))
                    number += 1
        except OSError as error:
            yield broken(self.file, number, error)


def _note(prompt: str) -> Note | None:
    """What to say of a line that other programs read as more than a prompt."""
    if not NOT_A_PROMPT.search(prompt):
        return None
    return Note("options", clean(repr(prompt if len(prompt) <= SHOWN else f"{prompt[: SHOWN - 3]}...")))


def open_plain(file: TableFile) -> Plain:
    """Raises OSError and TableError."""
    with open_bytes(file) as stream:
        if not stream.peek(1):
            raise TableError(f"{file.name} is empty")
    return Plain(file)
