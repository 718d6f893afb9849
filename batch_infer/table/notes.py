"""What a user should know about rows that are no fault: counted, with the first of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["blank", "short", "options"]

SHOWN = 5
"""Names of columns in one sentence."""

_MEANING: dict[Kind, str] = {
    "blank": "rows without any value, which are skipped",
    "short": "rows with fewer cells than there are columns, whose missing cells take their defaults",
    "options": "lines of .txt that look like comments or options and are rendered word for word "
    "(for parameters of a row use the columns of a .csv)",
}


class Note(NamedTuple):
    """A remark on one row. `detail` says what is particular to this row."""

    kind: Kind
    detail: str = ""


def short_row(count: int, columns: Sequence[str]) -> Note:
    """The note on a row that has so many cells, and none for the last of its columns."""
    missing = ", ".join(repr(name) for name in columns[count : count + SHOWN])
    return Note("short", f"{count} of {len(columns)} cells, without {missing}")


@dataclass(slots=True)
class _Tally:
    first: str
    rows: int = 0


class Notes:
    """The notes of one walk over the tables."""

    def __init__(self) -> None:
        self._tallies: dict[Kind, _Tally] = {}

    def add(self, note: Note, place: object) -> None:
        """Count a note on the row at `place`."""
        if note.kind not in self._tallies:
            self._tallies[note.kind] = _Tally(f"{place}{note.detail and ': '}{note.detail}")
        self._tallies[note.kind].rows += 1

    def sentences(self) -> list[str]:
        """One sentence for each kind."""
        return [f"{_MEANING[kind]}: {tally.rows:,} (first: {tally.first})" for kind, tally in self._tallies.items()]
