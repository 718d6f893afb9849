"""Choose the tables in a folder or glob, and record why other files are ignored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import cache
from glob import has_magic
from pathlib import PurePosixPath

from batch_infer.errors import TableError
from batch_infer.settings import METADATA, RESULTS_FILES
from batch_infer.table.formats import TABLE_SUFFIXES, parse_name

RESULTS = {
    *("run.json", *(name for names in RESULTS_FILES.values() for name in names)),
    METADATA,
    *("manifest", "images", "quarantine", "shards", "logs", "gallery"),
}
"""Names of the files in OUT that look like tables, and of the folders in OUT that may contain such files."""
_DOCUMENTATION = re.compile(
    r"(README|LICEN[CS]E|CHANGELOG).*|(?i:readme|licen[cs]e|changelog)(\..*)?|.*\.(?i:crc)", re.DOTALL
)
"""Matches the names of documentation files of data sets, and of Hadoop's checksum files."""
REASONS = {
    "name": "for their names",
    "ending": "for their endings",
    "run": "as output of an earlier run",
    "link": "as links to folders",
}
"""Reasons why files are ignored, and their wording in messages."""
MAX_SIMILAR, MAX_SHOWN = 3, 8
"""Maximum number of similar files to list separately, and maximum number of entries per reason in a message."""


def is_ignored_name(name: str, *, is_folder: bool = False) -> bool:
    """Return whether a file or folder is hidden, a marker (but not a Spark folder `_year=2026/`) or documentation."""
    if name.startswith("_"):
        return not (is_folder and "=" in name)
    return name.startswith(".") or (not is_folder and _DOCUMENTATION.fullmatch(name) is not None)


class IgnoredFiles(dict[str, str]):
    """Maps the displayed names of ignored files and folders to reasons. Names of folders end in /."""

    def group(self) -> dict[str, dict[str, int]]:
        """Return counts by reason and name. If more than MAX_SIMILAR names are similar, they share one entry."""
        groups = {reason: [name for name in self if self[name] == reason] for reason in REASONS}
        return {reason: _count_similar(names) for reason, names in groups.items() if names}

    def __str__(self) -> str:
        """Return one line for the user, or '' if no file is ignored."""
        return "; ".join(f"{REASONS[reason]}: {_join(counts)}" for reason, counts in self.group().items())


def _count_similar(names: Collection[str]) -> dict[str, int]:
    patterns = {name: _make_pattern(name) for name in names}
    counts = Counter(patterns.values())
    return dict(Counter(pattern if counts[pattern] > MAX_SIMILAR else name for name, pattern in patterns.items()))


def _make_pattern(name: str) -> str:
    """Return a pattern for files with the same suffix or, for folders and files without one, the same name."""
    path = PurePosixPath(name)
    if name.endswith("/"):
        return f"*/{path.name}/"
    return f"*{path.suffix.lower()}" if path.suffix else f"*/{path.name}"


def _join(counts: dict[str, int]) -> str:
    shown = [name if count == 1 else f"{count:,} {name}" for name, count in list(counts.items())[:MAX_SHOWN]]
    more = sum(list(counts.values())[MAX_SHOWN:])
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


class TableFilter:
    """Chooses the tables in a local or remote folder. Paths are relative to the folder.

    Ignores hidden files, markers, documentation, files without a table suffix, and the output of earlier runs: the
    folder may be an OUT, which has a run.json, or contain one.
    """

    def __init__(
        self, argument: str, is_file: Callable[[str], bool], get_name: Callable[[str], str], ignored: IgnoredFiles
    ) -> None:
        """`get_name` returns the displayed name of a path. The filter adds ignored files to `ignored`."""
        self._argument, self._get_name, self._ignored = argument, get_name, ignored
        self._has_run = cache(lambda folder: is_file(f"{folder}/run.json" if folder else "run.json"))

    def find_reason(self, relative: str) -> tuple[str, str] | None:
        """Return the path that causes a file or a folder (ending in /) to be ignored, and why, or None if none does."""
        is_folder = relative.endswith("/")
        parts = relative.rstrip("/").split("/")
        for depth, part in enumerate(parts, 1):
            parent, path = "/".join(parts[: depth - 1]), "/".join(parts[:depth])
            is_parent = is_folder or depth < len(parts)
            if (part in RESULTS or part.startswith(".")) and self._has_run(parent):
                return f"{parent or '.'}/", "run"
            if is_ignored_name(part, is_folder=is_parent):
                return f"{path}/" if is_parent else path, "name"
        return None if is_folder or parse_name(relative) else (relative, "ending")

    def is_ignored(self, relative: str) -> bool:
        """Return whether a file or folder is ignored, and record why."""
        reason = self.find_reason(relative)
        if reason:
            self._ignored.setdefault(self._get_name(reason[0]), reason[1])
        return reason is not None

    def choose(self, relatives: Iterable[str]) -> list[str]:
        """Return the tables, sorted by path components, and record other files. Raises TableError without any table."""
        ordered = sorted(relatives, key=lambda relative: relative.split("/"))
        tables = [relative for relative in ordered if not self.is_ignored(relative)]
        if not tables:
            action = "glob matches" if has_magic(self._argument) else "folder contains"
            others = f"; ignored {self._ignored}" if self._ignored else ""
            raise TableError(f"{self._argument}: the {action} no table ({TABLE_SUFFIXES}){others}")
        return tables


def find_outermost_folders(folders: Iterable[str]) -> list[str]:
    """Return the folders that are not inside another folder in the list, sorted."""
    outermost: list[str] = []
    for folder in sorted(folders, key=lambda path: [] if path == "." else path.split("/")):
        last = outermost[-1] if outermost else None
        if last is None or not (last == "." or folder.startswith(f"{last.rstrip('/')}/")):
            outermost.append(folder)
    return outermost
