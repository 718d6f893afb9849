"""What a file's name says: whether it is a table, of which format, and what its rows are called."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from batch_infer.records import COMPRESSION_SUFFIXES
from batch_infer.table.text import clean

FORMATS = (".csv", ".tsv", ".parquet", ".pq", ".parq", ".jsonl", ".ndjson", ".json", ".txt")
SHORT_FORMS = {".pq": ".parquet", ".parq": ".parquet"}
ENDINGS = (
    f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}, also with {', '.join(COMPRESSION_SUFFIXES[:-1])}"
    f" or {COMPRESSION_SUFFIXES[-1]} after it"
)

_FORMAT, _PACKING = ("|".join(map(re.escape, endings)) for endings in (FORMATS, COMPRESSION_SUFFIXES))
_ENDING = re.compile(
    f"(?P<stem>.*[^/])(?P<format>{_FORMAT})(?P<packing>{_PACKING})?",
    re.IGNORECASE | re.DOTALL,
)


ID_DIGITS = 8
"""Of the row's number in a default id."""


def make_default_id(stem: str, row: int) -> str:
    """The id of a row that its table gives none."""
    return f"{stem}-{row:0{ID_DIGITS}d}"


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file to read, or in its place the fault of an argument that means none.

    `path` is what is read; `name` is what the user called it; `stem` is that of its rows' default ids: the path
    relative to the argument, without its endings. `packing` is the compression's ending, or ''. `is_named`: the
    argument is this file, and not a folder or glob that holds it. `url` is what is opened of a remote file: it may hold
    a secret, and is never shown or stored.
    """

    path: Path
    name: str
    stem: str
    format: str = ""
    packing: str = ""
    origin: Literal["file", "url", "stdin"] = "file"
    fault: str | None = None
    is_named: bool = True
    url: str = field(default="", repr=False)

    def default_id(self, row: int) -> str:
        return make_default_id(self.stem, row)


@dataclass(frozen=True, slots=True)
class Ending:
    """A name taken apart: `stem` is of default ids."""

    stem: str
    format: str
    packing: str


def read_ending(relative: str) -> Ending | None:
    """The parts of a path that ends as a table does, else None."""
    found = _ENDING.fullmatch(relative)
    if found is None:
        return None
    kind = found["format"].lower()
    return Ending(_as_stem(found["stem"]), SHORT_FORMS.get(kind, kind), (found["packing"] or "").lower())


def plain_stem(name: str) -> str:
    """The stem for a name that does not end as a table does."""
    ending = read_ending(name)
    return ending.stem if ending else _as_stem(name.rpartition(".")[0] or name)


def unknown_ending(name: str) -> str:
    return f"unknown ending {Path(name).suffix or '(none)'}; a table ends in {ENDINGS}"


def _as_stem(relative: str) -> str:
    return clean(relative).replace("/", "-")
