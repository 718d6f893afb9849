"""Find the tables of TABLE arguments: files, folders, globs, URLs of these, standard input, and tables in memory.

Remote tables are downloaded, and standard input is copied. Tables in memory are written to files.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_infer.errors import TableError
from batch_infer.store import create_temporary, get_protocol, is_http, redact_url
from batch_infer.table.base import Scratch, TableFile, format_error, raise_storage_error, replace_surrogates
from batch_infer.table.formats import TABLE_SUFFIXES, detect_format, get_stem, parse_name
from batch_infer.table.memory import find_in_memory, write_in_memory
from batch_infer.table.selection import IgnoredFiles, TableFilter, find_outermost_folders
from batch_infer.table.streams import BUFFER
from batch_infer.table.urls import join_url, split_chain

if TYPE_CHECKING:
    from batch_infer.table.remote import RemoteFiles, RemoteListing

STDIN = "-"


def find_files(arguments: Iterable[str], folder: Path, scratch: Scratch) -> tuple[list[TableFile], IgnoredFiles]:
    """Return the distinct files of all arguments, in argument order, and the ignored files.

    Relative paths are relative to `folder`. An argument without a table becomes a TableFile with an error. Raises
    TableError if there is nothing to return, for example without arguments, ServiceError if a service fails, and
    StorageError if the disk fails or the temporary folder is full.
    """
    files: dict[str | Path, TableFile] = {}
    ignored = IgnoredFiles()
    for argument in dict.fromkeys(arguments):
        for file in _expand(argument, folder, scratch, ignored):
            # Several arguments may match a file: identify it by its URL or resolved path if it has one.
            is_local = file.error is None and file.origin == "file"
            identity = file.url or (file.path.resolve() if is_local else file.name)
            first = files.setdefault(identity, file)
            if file.is_named and not first.is_named:
                files[identity] = replace(first, is_named=True)
    if not files:
        raise TableError(f"no TABLE given: pass a file ({TABLE_SUFFIXES}), a folder, a glob, a URL, or -")
    for file in files.values():
        ignored.pop(file.name, None)
    return list(files.values()), ignored


def number_names(files: Iterable[TableFile]) -> list[TableFile]:
    """Rename the second file named `t.csv` to `t.csv#2`, and so on.

    Files have the same name if their URLs differ only in a secret part, such as the query.
    """
    counts = Counter[str]()
    numbered = []
    for file in files:
        counts[file.name] += 1
        number = counts[file.name]
        numbered.append(file if number == 1 else replace(file, name=f"{file.name}#{number}"))
    return numbered


def _expand(argument: str, folder: Path, scratch: Scratch, ignored: IgnoredFiles) -> list[TableFile]:
    name = replace_surrogates(redact_url(argument))
    try:
        if argument == STDIN:
            return [_copy_stdin(scratch)]
        if (data := find_in_memory(argument)) is not None:
            return [write_in_memory(argument, data, scratch)]
        if get_protocol(argument) and not (folder / argument).exists():
            return _find_remote(argument, name, scratch, ignored)
        return _find_local(argument, folder, ignored)
    except TableError as exc:
        error = str(exc)
    except (OSError, ValueError) as exc:  # ValueError: pathlib rejects the pattern
        raise_storage_error(exc, name)
        error = f"{name}: {format_error(exc)}"
    url = argument if get_protocol(argument) else ""
    return [TableFile(folder, name, get_stem(name.rstrip("/").rpartition("/")[2]), error=error, url=url)]


def _copy_stdin(scratch: Scratch) -> TableFile:
    """Copy standard input to a file, since tables are read more than once. Raises TableError and StorageError."""
    if sys.stdin is None or sys.stdin.closed:
        raise TableError("-: there is no standard input to read")
    if sys.stdin.isatty():
        raise TableError("-: standard input is a terminal; pipe a table in (batch-infer run - < prompts.csv)")
    try:
        path = scratch.new_path()
        with create_temporary(path) as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy, BUFFER)
        return detect_format(TableFile(path, "stdin", "stdin", origin="stdin"))
    except OSError as error:
        raise_storage_error(error, "standard input")
        raise TableError(f"-: standard input cannot be read: {format_error(error)}") from error


def _make_file(path: Path, name: str, relative: str, **options: Any) -> TableFile:
    """Return the file at `path`. Its stem, format and compression come from `relative`, its path below a folder.

    Raises TableError if `relative` has no table suffix.
    """
    parts = parse_name(relative)
    if parts is None:
        raise TableError(
            f"{name}: unknown file extension {Path(relative).suffix or '(none)'}; a table ends in {TABLE_SUFFIXES}"
        )
    return TableFile(path, name, *parts, **options)


def _find_remote(url: str, name: str, scratch: Scratch, ignored: IgnoredFiles) -> list[TableFile]:
    """Download the tables at a URL. A table whose download is refused has an error.

    Raises TableError if the URL cannot be opened or has no table, ServiceError if a service fails, and StorageError if
    the temporary folder is full or cannot be created.
    """
    from batch_infer.table.remote import RemoteErrors, connect  # imports fsspec, which local tables do not need

    with RemoteErrors(name):
        remote = connect(url, name)
        listing = remote.list_files()
        if listing is None:
            url = url.partition("#")[0] if is_http(url) else url  # not sent, so it does not identify a file
            relative = split_chain(name)[1].rpartition("/")[2]
            files = {remote.path: _make_file(scratch.new_path(), name, relative, origin="url", url=url)}
        else:
            files = _choose_remote(remote, listing, name, scratch, ignored)
    for path, file in files.items():
        try:
            with RemoteErrors(file.name):
                remote.system.get_file(path, str(file.path))
        except TableError as error:  # a missing or forbidden file does not affect other files
            files[path] = replace(file, error=str(error))
    return list(files.values())


def _choose_remote(
    remote: RemoteFiles, listing: RemoteListing, name: str, scratch: Scratch, ignored: IgnoredFiles
) -> dict[str, TableFile]:
    """Return the tables in a remote folder or glob by remote path."""
    paths = {path[len(listing.folder) :].lstrip("/"): path for path in listing.paths}

    def get_name(relative: str) -> str:
        return replace_surrogates(join_url(redact_url(listing.url), relative))

    def is_file(relative: str) -> bool:
        return bool(remote.system.isfile("/".join(filter(None, [listing.folder, relative]))))

    files = {}
    for relative in TableFilter(name, is_file, get_name, ignored).choose(paths):
        url = join_url(listing.url, relative)
        files[paths[relative]] = _make_file(
            scratch.new_path(), get_name(relative), relative, origin="url", is_named=False, url=url
        )
    return files


def _find_local(argument: str, folder: Path, ignored: IgnoredFiles) -> list[TableFile]:
    if not argument:  # it would name the working folder
        raise TableError("a TABLE argument is empty: name a file, folder or URL")
    user_path = Path(argument).expanduser()
    path = folder / user_path
    if path.is_dir():
        local = _LocalFolder(argument, user_path, folder, ignored)
        return local.choose(local.walk("."))
    if path.exists():
        return [_make_file(path, replace_surrogates(user_path.as_posix()), path.name)]
    if glob.has_magic(argument):
        parts = user_path.parts
        first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        local = _LocalFolder(argument, Path(*parts[:first]), folder, ignored)
        return local.choose(local.match("/".join(parts[first:])))
    raise TableError(f"{replace_surrogates(argument)}: no such file or folder")


class _LocalFolder:
    """Finds the tables in a local folder. `user_path` is the folder as the user wrote it, with `~` expanded.

    `choose` raises TableError if there is no table, OSError if an unreadable folder may be the reason for finding no
    file, and StorageError if the disk fails.
    """

    def __init__(self, argument: str, user_path: Path, folder: Path, ignored: IgnoredFiles) -> None:
        self._user_path, self._folder, self._ignored = user_path, folder / user_path, ignored
        self._unreadable: list[OSError] = []
        self._filter = TableFilter(
            replace_surrogates(argument), lambda path: (self._folder / path).is_file(), self._get_name, ignored
        )

    def walk(self, relative: str) -> Iterator[str]:
        """Yield the files in a folder and its subfolders, but not those in ignored or linked folders."""
        for path, folders, files in os.walk(self._folder / relative, onerror=self._unreadable.append):
            parent = Path(path).relative_to(self._folder)
            folders[:] = [name for name in folders if self._should_list((parent / name).as_posix())]
            yield from ((parent / name).as_posix() for name in files)

    def match(self, pattern: str) -> Iterator[str]:
        """Yield the files that match a glob, and the files in folders that match it."""
        self._record_unreadable(pattern)
        matches = {path.relative_to(self._folder).as_posix(): path.is_dir() for path in self._folder.glob(pattern)}
        yield from (relative for relative, is_folder in matches.items() if not is_folder)
        for relative in find_outermost_folders(relative for relative, is_folder in matches.items() if is_folder):
            if relative == "." or self._should_list(relative):
                yield from self.walk(relative)

    def _record_unreadable(self, pattern: str) -> None:
        """Record unreadable folders on the path of a glob, which pathlib skips silently."""
        parts = pattern.split("/")
        for count in range(1, len(parts)):
            for path in self._folder.glob("/".join(parts[:count])):
                relative = path.relative_to(self._folder).as_posix()
                if path.is_dir() and (relative == "." or not self._filter.find_reason(f"{relative}/")):
                    try:
                        os.scandir(path).close()
                    except PermissionError as error:
                        self._unreadable.append(error)

    def _should_list(self, relative: str) -> bool:
        """Return whether to list a folder, or record why not. An ignored folder may contain millions of images."""
        if self._filter.is_ignored(f"{relative}/"):
            return False
        if (self._folder / relative).is_symlink():
            self._ignored.setdefault(self._get_name(f"{relative}/"), "link")
            return False
        return True

    def choose(self, relatives: Iterable[str]) -> list[TableFile]:
        """Return the tables among files, and a TableFile with an error for each unreadable folder or broken link."""
        relatives = list(dict.fromkeys(relatives))
        if self._unreadable and not relatives:
            raise self._unreadable[0]
        files = []
        for relative in self._filter.choose(relatives):
            path, name = self._folder / relative, self._get_name(relative)
            if path.is_symlink() and not path.exists():
                files.append(_make_unreadable(path, name, get_stem(relative), "the target of the link does not exist"))
            elif path.is_file():
                files.append(_make_file(path, name, relative, is_named=False))
        for error in self._unreadable:
            name = self._get_name(Path(error.filename).relative_to(self._folder).as_posix())
            raise_storage_error(error, name)
            files.append(_make_unreadable(self._folder, name, get_stem(name), format_error(error)))
        return files

    def _get_name(self, relative: str) -> str:
        return replace_surrogates((self._user_path / relative).as_posix()) + ("/" if relative.endswith("/") else "")


def _make_unreadable(path: Path, name: str, stem: str, message: str) -> TableFile:
    return TableFile(path, name, stem, error=f"{name}: {message}", is_named=False)
