"""Which files below a folder or glob are tables, and which are left out, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from glob import has_magic
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from batch_infer.table.endings import ENDINGS, read_ending

Reason = Literal["name", "ending", "run", "link"]

RESULTS = frozenset(
    {
        *("run.json", "results.parquet", "results.csv", "results.jsonl"),
        *("manifest", "images", "quarantine", "logs", "gallery"),
    }
)
"""What of an OUT ends as a table does, or may hold what does."""

_DOCUMENTATION = re.compile(
    r"(README|LICEN[CS]E|CHANGELOG).*|(?i:readme|licen[cs]e|changelog)(\..*)?|.*\.(?i:crc)", re.DOTALL
)
"""Words about data, and the checksums that Hadoop writes with it."""

_MEANING: dict[str, str] = {
    "name": "for their names",
    "ending": "for their endings",
    "run": "as output of an earlier run",
    "link": "as links to folders",
}
ALIKE, SHOWN = 3, 8
"""Files of one ending that are named one by one, and items of one reason in a sentence."""


class Cause(NamedTuple):
    """Why a file is left out. `culprit` is the file, or the folder (with / at its end) that is left out as a whole."""

    reason: Reason
    culprit: str


def is_ignored_name(name: str, *, is_folder: bool = False) -> bool:
    """Whether the name of a file or folder says that no table is there: hidden files, markers, documentation.

    Like Spark, this takes a folder `_year=2026` for a partition.
    """
    if name.startswith("_"):
        return not (is_folder and "=" in name)
    return name.startswith(".") or (not is_folder and _DOCUMENTATION.fullmatch(name) is not None)


def why_left_out(relative: str, holds_run: Callable[[str], bool]) -> Cause | None:
    """Return why a file below a folder or glob is no table of it, or None; a folder's path ends with /.

    `holds_run` says of a folder, relative to the same place, whether a run.json is in it: what an earlier run made is
    no table, and its OUT may be among the tables, or be their folder.
    """
    is_folder = relative.endswith("/")
    parts = relative.rstrip("/").split("/")
    for depth, part in enumerate(parts, 1):
        above, here = "/".join(parts[: depth - 1]), "/".join(parts[:depth])
        inner = is_folder or depth < len(parts)
        if (part in RESULTS or part.startswith(".")) and holds_run(above):
            return Cause("run", f"{above or '.'}/")
        if is_ignored_name(part, is_folder=inner):
            return Cause("name", f"{here}/" if inner else here)
    return None if is_folder or read_ending(relative) else Cause("ending", relative)


class LeftOut:
    """The files of folders and globs that are not read."""

    def __init__(self) -> None:
        self._reasons: dict[str, Reason] = {}

    def add(self, name: str, reason: Reason) -> None:
        """Take in a file, or a folder (with / at its end), by the name that the user is shown."""
        self._reasons.setdefault(name, reason)

    def forget(self, names: Iterable[str]) -> None:
        """Take out files that another argument has read."""
        for name in names:
            self._reasons.pop(name, None)

    def items(self) -> dict[str, dict[str, int]]:
        """Return what is left out for each reason, with the number of files; many that are alike are one item."""
        found: dict[str, dict[str, int]] = {}
        for reason in _MEANING:
            if names := [name for name, other in self._reasons.items() if other == reason]:
                found[reason] = _grouped(names)
        return found

    def __str__(self) -> str:
        """One line for the user, '' where nothing is left out."""
        return "; ".join(f"{_MEANING[reason]}: {_listed(items)}" for reason, items in self.items().items())


def tables_among(
    relatives: Iterable[str], holds_run: Callable[[str], bool], name_of: Callable[[str], str], left_out: LeftOut
) -> Iterator[str]:
    """Yield those paths below a folder or glob that are tables, and note the others under the names of `name_of`."""
    for relative in relatives:
        if cause := why_left_out(relative, holds_run):
            left_out.add(name_of(cause.culprit), cause.reason)
        else:
            yield relative


def outermost(folders: Iterable[str]) -> list[str]:
    """Return those of these folders that are not below another one of them, in order."""
    found: list[str] = []
    for folder in sorted(folders, key=lambda path: [] if path == "." else path.split("/")):
        if not found or not (found[-1] == "." or folder.startswith(f"{found[-1].rstrip('/')}/")):
            found.append(folder)
    return found


def holds_no_table(argument: str, left_out: LeftOut) -> str:
    """What to say of a folder or glob without a table."""
    what = "glob matches" if has_magic(argument) else "folder holds"
    return f"{argument}: the {what} no table ({ENDINGS}){'; left out ' if (others := str(left_out)) else ''}{others}"


def _grouped(names: Collection[str]) -> dict[str, int]:
    many = {pattern for pattern, count in Counter(map(_pattern, names)).items() if count > ALIKE}
    return dict(Counter(pattern if (pattern := _pattern(name)) in many else name for name in names))


def _pattern(name: str) -> str:
    """The files that are like this one: those of its ending or, without an ending, of its name."""
    path = PurePosixPath(name)
    if name.endswith("/"):
        return f"*/{path.name}/"
    return f"*{path.suffix.lower()}" if path.suffix else f"*/{path.name}"


def _listed(items: dict[str, int]) -> str:
    shown = [name if count == 1 else f"{count:,} {name}" for name, count in list(items.items())[:SHOWN]]
    more = sum(list(items.values())[SHOWN:])
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
