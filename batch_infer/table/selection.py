"""Choose the tables below a folder or glob, and record why other files are ignored."""

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
"""Names in OUT that have a table ending, or are folders with such files."""
_DOCUMENTATION = re.compile(
    r"(README|LICEN[CS]E|CHANGELOG).*|(?i:readme|licen[cs]e|changelog)(\..*)?|.*\.(?i:crc)", re.DOTALL
)
"""Matches documentation of data sets, and checksums written by Hadoop."""
_REASONS: dict[str, str] = {
    "name": "for their names",
    "ending": "for their endings",
    "run": "as output of an earlier run",
    "link": "as links to folders",
}
MAX_ALIKE, MAX_SHOWN = 3, 8
"""Maximum number of similar files to list separately, and of entries per reason in a message."""


def is_ignored_name(name: str, *, is_folder: bool = False) -> bool:
    """Return whether the name of a file or folder is hidden, a marker or documentation, and so not a table.

    A folder `_year=2026` is a partition, as in Spark.
    """
    if name.startswith("_"):
        return not (is_folder and "=" in name)
    return name.startswith(".") or (not is_folder and _DOCUMENTATION.fullmatch(name) is not None)


class IgnoredFiles:
    """Files of folders and globs that are not read, with reasons."""

    def __init__(self) -> None:
        self._reasons: dict[str, Reason] = {}

    def add(self, name: str, reason: Reason) -> None:
        """Add a file, or a folder (ending in /), by its displayed name."""
        self._reasons.setdefault(name, reason)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that are read because of another argument."""
        for name in names:
            self._reasons.pop(name, None)

    def items(self) -> dict[str, dict[str, int]]:
        """Return file counts by reason and name. More than MAX_ALIKE similar files share one entry."""
        names: dict[str, list[str]] = {}
        for name, reason in self._reasons.items():
            names.setdefault(reason, []).append(name)
        return {reason: _group(names[reason]) for reason in _REASONS if reason in names}

    def __str__(self) -> str:
        """Return one line for the user, or '' if no file is ignored."""
        return "; ".join(f"{_REASONS[reason]}: {_join(items)}" for reason, items in self.items().items())


def _group(names: Collection[str]) -> dict[str, int]:
    patterns = [_pattern(name) for name in names]
    counts = Counter(patterns)
    pairs = zip(names, patterns, strict=True)
    return dict(Counter(pattern if counts[pattern] > MAX_ALIKE else name for name, pattern in pairs))


def _pattern(name: str) -> str:
    """Return a pattern for files with the same ending or, without an ending, with the same name."""
    path = PurePosixPath(name)
    if name.endswith("/"):
        return f"*/{path.name}/"
    return f"*{path.suffix.lower()}" if path.suffix else f"*/{path.name}"


def _join(items: dict[str, int]) -> str:
    shown = [name if count == 1 else f"{count:,} {name}" for name, count in list(items.items())[:MAX_SHOWN]]
    more = sum(list(items.values())[MAX_SHOWN:])
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


class Cause(NamedTuple):
    """Why a file is ignored. `culprit` is the file, or a folder (ending in /) that is ignored completely."""

    reason: Reason
    culprit: str


class TableFilter:
    """Chooses the tables below a local or remote folder. Paths are relative to the folder.

    Leaves out the output of earlier runs: OUT, recognized by its run.json, may be below the folder or be the folder.
    """

    def __init__(
        self, argument: str, is_file: Callable[[str], bool], name_of: Callable[[str], str], ignored: IgnoredFiles
    ) -> None:
        """`name_of` returns the displayed name of a path. `ignored` receives files that are not tables."""
        self._argument, self._name_of, self._ignored = argument, name_of, ignored
        self._has_run = cache(lambda folder: is_file(f"{folder}/run.json" if folder else "run.json"))

    def find_cause(self, relative: str) -> Cause | None:
        """Return why a file is not a table, or why a folder (ending in /) is ignored, else None."""
        is_folder = relative.endswith("/")
        parts = relative.rstrip("/").split("/")
        for depth, part in enumerate(parts, 1):
            parent, path = "/".join(parts[: depth - 1]), "/".join(parts[:depth])
            is_parent = is_folder or depth < len(parts)
            if (part in RESULTS or part.startswith(".")) and self._has_run(parent):
                return Cause("run", f"{parent or '.'}/")
            if is_ignored_name(part, is_folder=is_parent):
                return Cause("name", f"{path}/" if is_parent else path)
        return None if is_folder or parse_name(relative) else Cause("ending", relative)

    def is_ignored(self, relative: str) -> bool:
        """Return whether a file or folder is ignored, and record why."""
        cause = self.find_cause(relative)
        if cause:
            self._ignored.add(self._name_of(cause.culprit), cause.reason)
        return cause is not None

    def choose(self, relatives: Iterable[str]) -> list[str]:
        """Return the tables in pathlib's sort order, and record other files. Raises TableError if there is no table."""
        ordered = sorted(relatives, key=lambda relative: relative.split("/"))
        tables = [relative for relative in ordered if not self.is_ignored(relative)]
        if not tables:
            action = "glob matches" if has_magic(self._argument) else "folder holds"
            others = f"; ignored {self._ignored}" if str(self._ignored) else ""
            raise TableError(f"{self._argument}: the {action} no table ({ENDINGS}){others}")
        return tables


def outermost_folders(folders: Iterable[str]) -> list[str]:
    """Return the folders that are not inside another folder in the list, sorted."""
    outermost: list[str] = []
    for folder in sorted(folders, key=lambda path: [] if path == "." else path.split("/")):
        last = outermost[-1] if outermost else None
        if last is None or not (last == "." or folder.startswith(f"{last.rstrip('/')}/")):
            outermost.append(folder)
    return outermost
