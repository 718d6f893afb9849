"""The files that a TABLE argument means: one file, a folder of them, or a glob."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from batch_infer.errors import TableError
from batch_infer.table.text import clean

ENDINGS = (".csv", ".parquet")
RESULTS = ("manifest", "results.parquet", "results.csv")
"""What of an OUT ends as a table does."""


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file, and the stem of its rows' default ids: its path relative to the argument, without its ending."""

    path: Path
    stem: str

    @property
    def name(self) -> str:
        return clean(self.path.as_posix())

    @property
    def format(self) -> str:
        return self.path.suffix.lower()

    def default_id(self, row: int) -> str:
        return f"{self.stem}-{row:08d}"


def find_files(arguments: Iterable[str]) -> list[TableFile]:
    """The files of all arguments, each once, in the order given and by name within a folder. Raises TableError."""
    found: dict[Path, TableFile] = {}
    for argument in arguments:
        for file in _expand(argument):
            found.setdefault(file.path.resolve(), file)
    if not found:
        raise TableError("no TABLE given: name a CSV or Parquet file, a folder of them, or a glob")
    return list(found.values())


def stems_that_meet(files: Iterable[TableFile]) -> set[str]:
    """Stems that more than one file has: without an id column their rows would share default ids."""
    return {stem for stem, count in Counter(file.stem for file in files).items() if count > 1}


def _expand(argument: str) -> Iterator[TableFile]:
    path = Path(argument).expanduser()
    if path.is_dir():
        yield from _folder(path)
    elif path.exists():
        if path.suffix.lower() not in ENDINGS:
            raise TableError(f"{argument}: unknown ending {path.suffix or '(none)'}; a table ends in {_endings()}")
        yield TableFile(path, _stem(path.name))
    elif glob.has_magic(argument):
        yield from _glob(argument)
    else:
        raise TableError(f"{argument}: no such file or folder")


def _folder(folder: Path) -> Iterator[TableFile]:
    tables = sorted(path for path in folder.rglob("*") if _is_table(path, folder))
    if not tables:
        raise TableError(f"{folder}: the folder holds no table ({_endings()})")
    for path in tables:
        yield TableFile(path, _stem(path.relative_to(folder).as_posix()))


def _glob(pattern: str) -> Iterator[TableFile]:
    parts = Path(pattern).expanduser().parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    fixed = Path(*parts[:first])
    tables = sorted(path for path in fixed.glob("/".join(parts[first:])) if _is_table(path, fixed))
    if not tables:
        raise TableError(f"{pattern}: the glob matches no table ({_endings()})")
    for path in tables:
        yield TableFile(path, _stem(path.relative_to(fixed).as_posix()))


def _is_table(path: Path, below: Path) -> bool:
    """A file with a table's ending; hidden ones (and what lies in hidden folders) are other programs' leavings."""
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(below).parts)
    return path.suffix.lower() in ENDINGS and not hidden and path.is_file() and not _is_result(path, below)


def _is_result(path: Path, below: Path) -> bool:
    """Whether an earlier run made this file: its OUT may lie among the tables, or be their folder."""
    folder = below
    for part in path.relative_to(below).parts:
        if part in RESULTS and (folder / "run.json").is_file():
            return True
        folder /= part
    return False


def _stem(relative: str) -> str:
    return clean(relative).rpartition(".")[0].replace("/", "-")


def _endings() -> str:
    return " or ".join(ENDINGS)
