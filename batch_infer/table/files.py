"""The files that TABLE arguments mean: a file, a folder, a glob, standard input, or a URL of any of the first three."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from batch_infer.errors import TableError
from batch_infer.table.endings import (
    ENDINGS,
    TableFile,
    plain_stem,
    read_ending,
    unknown_ending,
)
from batch_infer.table.scratch import Scratch
from batch_infer.table.selection import LeftOut, holds_no_table, outermost, tables_among, why_left_out
from batch_infer.table.stdin import spool
from batch_infer.table.streams import reason, refuse_storage_fault
from batch_infer.table.text import clean
from batch_infer.table.urls import protocol_of, redact_url

STDIN = "-"


def find_files(arguments: Iterable[str], folder: Path, scratch: Scratch) -> tuple[list[TableFile], LeftOut]:
    """The files of all arguments, each once, in the order given and by name within a folder; and what is left out.

    Relative names start at `folder`. An argument that means no file stands in the list with its fault. Raises
    TableError where there is no argument, ServiceError where a service does not answer, StorageError where the disk
    fails.
    """
    found: dict[str | Path, TableFile] = {}
    left_out = LeftOut()
    for argument in dict.fromkeys(arguments):
        for file in _expand(argument, folder, scratch, left_out):
            known = found.setdefault(_identity(file), file)
            if file.is_named and not known.is_named:
                found[_identity(file)] = replace(known, is_named=True)
    if not found:
        raise TableError(f"no TABLE given: name a file ({ENDINGS}), a folder of them, a glob, a URL, or -")
    left_out.forget(file.name for file in found.values())
    return list(found.values()), left_out


def stems_that_meet(files: Iterable[TableFile]) -> set[str]:
    """Stems that more than one file has: without an id column their rows would share default ids."""
    return {stem for stem, count in Counter(file.stem for file in files).items() if count > 1}


def with_distinct_names(files: Iterable[TableFile]) -> list[TableFile]:
    """Return the files with `t.csv#2` as the name of the second one named `t.csv`.

    URLs that differ only in a part that is not shown, such as the query, have one name.
    """
    count = Counter[str]()
    distinct = []
    for file in files:
        count[file.name] += 1
        number = count[file.name]
        distinct.append(file if number == 1 else replace(file, name=f"{file.name}#{number}"))
    return distinct


def _identity(file: TableFile) -> str | Path:
    """Return what identifies a file that several arguments may mean: the whole URL or path that is opened."""
    if file.url:
        return file.url
    return file.path.resolve() if file.fault is None and file.origin == "file" else file.name


def _expand(argument: str, folder: Path, scratch: Scratch, left_out: LeftOut) -> list[TableFile]:
    try:
        if argument == STDIN:
            return [spool(scratch)]
        if protocol_of(argument) and not (folder / argument).exists():
            from batch_infer.table.remote import fetch  # a local table does not pay for the import of fsspec

            return fetch(argument, scratch, left_out)
        return list(_local(argument, folder, left_out))
    except TableError as error:
        fault = str(error)
    except (OSError, ValueError) as error:  # ValueError: a pattern that pathlib does not take
        refuse_storage_fault(error, clean(redact_url(argument)))
        fault = f"{clean(redact_url(argument))}: {reason(error)}"
    name, url = clean(redact_url(argument)), argument if protocol_of(argument) else ""
    return [TableFile(folder, name, plain_stem(name.rstrip("/").rpartition("/")[2]), fault=fault, url=url)]


def _local(argument: str, folder: Path, left_out: LeftOut) -> Iterator[TableFile]:
    named = Path(argument).expanduser()
    path = folder / named
    if path.is_dir():
        yield from _Below(argument, named, folder, left_out).walk()
    elif path.exists():
        ending = read_ending(path.name)
        if ending is None:
            raise TableError(f"{clean(argument)}: {unknown_ending(path.name)}")
        yield TableFile(path, clean(named.as_posix()), ending.stem, ending.format, ending.packing)
    elif glob.has_magic(argument):
        first = next(i for i, part in enumerate(named.parts) if glob.has_magic(part))
        yield from _Below(argument, Path(*named.parts[:first]), folder, left_out).match("/".join(named.parts[first:]))
    else:
        raise TableError(f"{clean(argument)}: no such file or folder")


class _Below:
    """What is below a folder, or is matched by a glob below it; `named` is the folder as the user called it."""

    def __init__(self, argument: str, named: Path, folder: Path, left_out: LeftOut) -> None:
        self._argument, self._named, self._left_out = argument, named, left_out
        self._folder = folder / named
        self._unreadable: list[OSError] = []
        self._holds_run = cache(lambda inner: (self._folder / inner / "run.json").is_file())

    def walk(self) -> Iterator[TableFile]:
        """All tables of the folder. Raises TableError, OSError."""
        return self._tables(list(self._files_in(".")))

    def match(self, pattern: str) -> Iterator[TableFile]:
        """The tables among the matches of a glob, and those in folders that it matches. Raises TableError, OSError."""
        self._note_unreadable(pattern)
        is_folder = {path.relative_to(self._folder).as_posix(): path.is_dir() for path in self._folder.glob(pattern)}
        files = [relative for relative, folder in is_folder.items() if not folder]
        for relative in outermost(relative for relative, folder in is_folder.items() if folder):
            if relative == "." or self._is_entered(relative):
                files += self._files_in(relative)
        return self._tables(list(dict.fromkeys(files)))

    def _note_unreadable(self, pattern: str) -> None:
        """Record unreadable folders along a glob's path: pathlib skips them silently."""
        parts = pattern.split("/")
        for count in range(1, len(parts)):
            for path in self._folder.glob("/".join(parts[:count])):
                relative = path.relative_to(self._folder).as_posix()
                if path.is_dir() and (relative == "." or not why_left_out(f"{relative}/", self._holds_run)):
                    try:
                        os.scandir(path).close()
                    except PermissionError as error:
                        self._unreadable.append(error)

    def _files_in(self, relative: str) -> Iterator[str]:
        """Yield the files in a folder and those below it."""
        for here, folders, files in os.walk(self._folder / relative, onerror=self._unreadable.append):
            inner = Path(here).relative_to(self._folder)
            paths = [(inner / name).as_posix() for name in folders]
            folders[:] = [name for name, path in zip(folders, paths, strict=True) if self._is_entered(path)]
            yield from ((inner / name).as_posix() for name in files)

    def _faults(self) -> Iterator[TableFile]:
        for error in self._unreadable:
            name = self._name_of(Path(error.filename).relative_to(self._folder).as_posix())
            refuse_storage_fault(error, name)
            yield TableFile(self._folder, name, plain_stem(name), fault=f"{name}: {reason(error)}", is_named=False)

    def _is_entered(self, relative: str) -> bool:
        """Whether a folder is looked into; what is in another is not even listed, since it may be a million images."""
        if cause := why_left_out(f"{relative}/", self._holds_run):
            self._left_out.add(self._name_of(cause.culprit), cause.reason)
        elif (self._folder / relative).is_symlink():
            self._left_out.add(self._name_of(f"{relative}/"), "link")
        else:
            return True
        return False

    def _tables(self, relatives: list[str]) -> Iterator[TableFile]:
        if self._unreadable and not relatives:
            raise self._unreadable[0]
        relatives.sort(key=lambda relative: relative.split("/"))  # as pathlib sorts
        tables = list(tables_among(relatives, self._holds_run, self._name_of, self._left_out))
        if not tables:
            raise TableError(holds_no_table(clean(self._argument), self._left_out))
        for relative in tables:
            path, name = self._folder / relative, self._name_of(relative)
            if path.is_symlink() and not path.exists():
                fault = f"{name}: the link leads to no file"
                yield TableFile(path, name, plain_stem(relative), fault=fault, is_named=False)
            elif (ending := read_ending(relative)) and path.is_file():
                yield TableFile(path, name, ending.stem, ending.format, ending.packing, is_named=False)
        yield from self._faults()

    def _name_of(self, relative: str) -> str:
        return clean((self._named / relative).as_posix()) + ("/" if relative.endswith("/") else "")
