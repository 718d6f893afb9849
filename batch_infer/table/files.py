"""The files that TABLE arguments mean: a file, a folder, a glob, standard input, or a URL of any of the first three."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from batch_infer.errors import TableError
from batch_infer.table.endings import (
    ENDINGS,
    TableFile,
    holds_no_table,
    is_table,
    plain_stem,
    read_ending,
    unknown_ending,
)
from batch_infer.table.scratch import Scratch
from batch_infer.table.stdin import spool
from batch_infer.table.streams import reason
from batch_infer.table.text import clean
from batch_infer.table.urls import is_http, protocol_of, shown

STDIN = "-"


def find_files(arguments: Iterable[str], folder: Path, scratch: Scratch) -> list[TableFile]:
    """The files of all arguments, each once, in the order given and by name within a folder.

    Relative names start at `folder`. An argument that means no file stands in the list with its fault. Raises
    TableError where there is no argument, and ServiceError where a service does not answer.
    """
    found: dict[str | Path, TableFile] = {}
    for argument in dict.fromkeys(arguments):
        for file in _expand(argument, folder, scratch):
            known = found.setdefault(_identity(argument, file), file)
            if file.is_named and not known.is_named:
                found[_identity(argument, file)] = replace(known, is_named=True)
    if not found:
        raise TableError(f"no TABLE given: name a file ({ENDINGS}), a folder of them, a glob, a URL, or -")
    return list(found.values())


def stems_that_meet(files: Iterable[TableFile]) -> set[str]:
    """Stems that more than one file has: without an id column their rows would share default ids."""
    return {stem for stem, count in Counter(file.stem for file in files).items() if count > 1}


def _identity(argument: str, file: TableFile) -> str | Path:
    """By which a file that two arguments mean is known: of http, two queries are two files of one name."""
    if file.fault is None and file.origin == "file":
        return file.path.resolve()
    return argument if is_http(argument) else file.name


def _expand(argument: str, folder: Path, scratch: Scratch) -> list[TableFile]:
    try:
        if argument == STDIN:
            return [spool(scratch)]
        if protocol_of(argument) and not (folder / argument).exists():
            from batch_infer.table.remote import fetch  # a local table does not pay for the import of fsspec

            return fetch(argument, scratch)
        return list(_local(argument, folder))
    except TableError as error:
        fault = str(error)
    except (OSError, ValueError) as error:  # ValueError: a pattern that pathlib does not take
        fault = f"{clean(shown(argument))}: {reason(error)}"
    name = clean(shown(argument))
    return [TableFile(folder, name, plain_stem(name.rstrip("/").rpartition("/")[2]), fault=fault)]


def _local(argument: str, folder: Path) -> Iterator[TableFile]:
    named = Path(argument).expanduser()
    path = folder / named
    if path.is_dir():
        yield from _below(argument, named, folder, path.rglob("*"))
    elif path.exists():
        ending = read_ending(path.name)
        if ending is None:
            raise TableError(f"{clean(argument)}: {unknown_ending(path.name)}")
        yield TableFile(path, clean(named.as_posix()), ending.stem, ending.format, ending.packing)
    elif glob.has_magic(argument):
        first = next(i for i, part in enumerate(named.parts) if glob.has_magic(part))
        fixed = Path(*named.parts[:first])
        yield from _below(argument, fixed, folder, (folder / fixed).glob("/".join(named.parts[first:])))
    else:
        raise TableError(f"{clean(argument)}: no such file or folder")


def _below(argument: str, named: Path, folder: Path, paths: Iterable[Path]) -> Iterator[TableFile]:
    """The tables among what lies below a folder, or is matched by a glob below it."""
    below = folder / named

    def holds_run(inner: str) -> bool:
        return (below / inner / "run.json").is_file()

    relatives = {path: path.relative_to(below).as_posix() for path in sorted(paths)}
    tables = [path for path, relative in relatives.items() if is_table(relative, holds_run) and path.is_file()]
    if not tables:
        raise TableError(holds_no_table(clean(argument)))
    for path in tables:
        if ending := read_ending(relatives[path]):
            name = clean((named / relatives[path]).as_posix())
            yield TableFile(path, name, ending.stem, ending.format, ending.packing, is_named=False)
