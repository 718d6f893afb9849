"""Which files below a folder or glob are tables, and which are left out, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import cache
from glob import has_magic
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from batch_infer.errors import TableError
from batch_infer.table.formats import ENDINGS, parse_name

Reason = Literal["name", "ending", "run", "link"]

RESULTS = frozenset(
    {
        *("run.json", "results.parquet", "results.csv", "results.jsonl"),
        *("manifest", "images", "quarantine", "logs", "gallery"),
    }
)
"""Names in OUT that end as a table does, or contain files that do."""
_DOCUMENTATION = re.compile(
    r"(README|LICEN[CS]E|CHANGELOG).*|(?i:readme|licen[cs]e|changelog)(\..*)?|.*\.(?i:crc)", re.DOTALL
)
"""Documentation of data, and the checksums that Hadoop writes with it."""
_REASONS: dict[str, str] = {
    "name": "for their names",
    "ending": "for their endings",
    "run": "as output of an earlier run",
    "link": "as links to folders",
}
MAX_ALIKE, MAX_SHOWN = 3, 8
"""Files of one ending that are named one by one, and items of one reason in a message."""


def is_ignored_name(name: str, *, is_folder: bool = False) -> bool:
    """Return whether the name of a file or folder says that it is no table: hidden, a marker or documentation.

    Like Spark, this takes a folder `_year=2026` for a partition.
    """
    if name.startswith("_"):
        return not (is_folder and "=" in name)
    return name.startswith(".") or (not is_folder and _DOCUMENTATION.fullmatch(name) is not None)


class LeftOutFiles:
    """The files of folders and globs that are not read, with reasons."""

    def __init__(self) -> None:
        self._reasons: dict[str, Reason] = {}

    def add(self, name: str, reason: Reason) -> None:
        """Add a file, or a folder (with / at its end), by the name that the user sees."""
        self._reasons.setdefault(name, reason)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that another argument has read."""
        for name in names:
            self._reasons.pop(name, None)

    def items(self) -> dict[str, dict[str, int]]:
        """Return what is left out for each reason, with the number of files. Many that are alike are one item."""
        names: dict[str, list[str]] = {}
        for name, reason in self._reasons.items():
            names.setdefault(reason, []).append(name)
        return {reason: _group(names[reason]) for reason in _REASONS if reason in names}

    def __str__(self) -> str:
        """Return one line for the user, '' where nothing is left out."""
        return "; ".join(f"{_REASONS[reason]}: {_join(items)}" for reason, items in self.items().items())


def _group(names: Collection[str]) -> dict[str, int]:
    many = {pattern for pattern, count in Counter(map(_pattern, names)).items() if count > MAX_ALIKE}
    return dict(Counter(pattern if (pattern := _pattern(name)) in many else name for name in names))


def _pattern(name: str) -> str:
    """Return a pattern for files like this one: those of its ending or, without an ending, of its name."""
    path = PurePosixPath(name)
    if name.endswith("/"):
        return f"*/{path.name}/"
    return f"*{path.suffix.lower()}" if path.suffix else f"*/{path.name}"


def _join(items: dict[str, int]) -> str:
    shown = [name if count == 1 else f"{count:,} {name}" for name, count in list(items.items())[:MAX_SHOWN]]
    more = sum(list(items.values())[MAX_SHOWN:])
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


class Cause(NamedTuple):
    """Why a file is left out. `culprit` is the file, or the folder (with / at its end) that is left out as a whole."""

    reason: Reason
    culprit: str


class TableFilter:
    """The choice of the tables among the files below a folder, local or remote. Paths are relative to the folder.

    The output of an earlier run is no table: its OUT may be among the tables, or be their folder. It is known by its
    run.json.
    """

    def __init__(
        self, argument: str, is_file: Callable[[str], bool], name_of: Callable[[str], str], left_out: LeftOutFiles
    ) -> None:
        """`name_of` returns the name of a path that the user sees. `left_out` receives the other files."""
        self._argument, self._name_of, self._left_out = argument, name_of, left_out
        self._holds_run = cache(lambda folder: is_file(f"{folder}/run.json" if folder else "run.json"))

    def find_cause(self, relative: str) -> Cause | None:
        """Return why a file is no table, or why a folder (with / at its end) contains none, else None."""
        is_folder = relative.endswith("/")
        parts = relative.rstrip("/").split("/")
        for depth, part in enumerate(parts, 1):
            above, here = "/".join(parts[: depth - 1]), "/".join(parts[:depth])
            is_inner = is_folder or depth < len(parts)
            if (part in RESULTS or part.startswith(".")) and self._holds_run(above):
                return Cause("run", f"{above or '.'}/")
            if is_ignored_name(part, is_folder=is_inner):
                return Cause("name", f"{here}/" if is_inner else here)
        return None if is_folder or parse_name(relative) else Cause("ending", relative)

    def is_left_out(self, relative: str) -> bool:
        """Return whether a file or folder is left out, and record why."""
        cause = self.find_cause(relative)
        if cause:
            self._left_out.add(self._name_of(cause.culprit), cause.reason)
        return cause is not None

    def choose(self, relatives: Iterable[str]) -> list[str]:
        """Return the tables, sorted as pathlib sorts, and record the others. Raises TableError where there is none."""
        ordered = sorted(relatives, key=lambda relative: relative.split("/"))
        tables = [relative for relative in ordered if not self.is_left_out(relative)]
        if not tables:
            action = "glob matches" if has_magic(self._argument) else "folder holds"
            others = f"; left out {self._left_out}" if str(self._left_out) else ""
            raise TableError(f"{self._argument}: the {action} no table ({ENDINGS}){others}")
        return tables


def outermost_folders(folders: Iterable[str]) -> list[str]:
    """Return the folders that are not below another one of them, sorted."""
    outermost: list[str] = []
    for folder in sorted(folders, key=lambda path: [] if path == "." else path.split("/")):
        last = outermost[-1] if outermost else None
        if last is None or not (last == "." or folder.startswith(f"{last.rstrip('/')}/")):
            outermost.append(folder)
    return outermost
