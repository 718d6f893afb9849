"""Read plain text with one prompt per line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from batch_infer.errors import RowError, TableError
from batch_infer.table.base import RawRow, Reader, Remark, Scratch, TableFile, broken_off_row, clean
from batch_infer.table.streams import LineReader, open_bytes, open_text

NOT_A_PROMPT = re.compile(r"^\s*(#|//)|(^|\s)--[A-Za-z][\w-]*([\s=]|$)|\s-[A-Za-z][ =]?[0-9.]+(\s|$)")
"""Matches comments and options in prompt files of other programs: sd-scripts and AUTOMATIC1111 (`--steps 20`),
Midjourney (`--ar 16:9`), InvokeAI (`-s50`)."""
SHOWN_CHARACTERS = 60


def open_plain_text(file: TableFile, prompt_column: str, scratch: Scratch) -> TextReader:
    """Open a plain text file. Raises OSError, and TableError for an empty file."""
    with open_bytes(file) as stream:
        if not stream.peek(1):
            raise TableError(f"{file.name} is empty")
    return TextReader(file, pa.schema([("prompt", pa.string())]), {})


@dataclass(frozen=True, slots=True)
class TextReader(Reader):
    """Reads the nonblank lines of a plain text file."""

    def rows(self) -> Iterator[RawRow]:
        row_number = 0
        try:
            with open_text(self.file, newline=None) as stream:
                lines = LineReader(stream)
                while True:
                    try:
                        prompt = next(lines).removesuffix("\n")
                    except StopIteration:
                        return
                    except RowError as error:
                        yield RawRow(row_number, {}, f"line {lines.number} {error}", lines.number)
                    else:
                        if not prompt.strip():
                            continue
                        yield RawRow(row_number, {"prompt": prompt}, None, lines.number, _remark(prompt))
                    row_number += 1
        except OSError as error:
            yield broken_off_row(self.file, row_number, error)


def _remark(prompt: str) -> Remark | None:
    """Return the remark on a line that other programs would not read as a plain prompt."""
    if not NOT_A_PROMPT.search(prompt):
        return None
    shown = prompt if len(prompt) <= SHOWN_CHARACTERS else f"{prompt[: SHOWN_CHARACTERS - 3]}..."
    return Remark("options", clean(repr(shown)))
