"""List and download files behind URLs with fsspec, and translate its errors.

Files are downloaded before they are read, so that all passes read the same bytes and none fails because of the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from glob import has_magic
from itertools import takewhile
from typing import Any, NamedTuple

from batch_infer.errors import BatchInferError, ServiceError, TableError
from batch_infer.store import connect as connect_to
from batch_infer.store import describe, is_http, is_refusal, is_service_error, split_query, temporary_file_errors
from batch_infer.table.selection import find_outermost_folders
from batch_infer.table.urls import split_chain


class RemoteListing(NamedTuple):
    """The fsspec paths of the files in a folder or glob.

    For a glob, `folder` and `url` end before the first component with a wildcard.
    """

    folder: str
    url: str
    paths: list[str]


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """A file, folder or glob at a URL. The URL may contain a secret. `path` is the path in fsspec's `system`."""

    system: Any
    path: str
    url: str

    def list_files(self) -> RemoteListing | None:
        """List a folder or glob. Return None for an HTTP URL or a single file, whose name may contain wildcards."""
        if is_http(split_chain(self.url)[1]):
            return None
        try:
            path_type = self.system.info(self.path)["type"]
        except FileNotFoundError:
            if not has_magic(self.path):
                raise
            path_type = "glob"
        if path_type == "directory":
            return RemoteListing(self.path.rstrip("/"), self.url, list(self.system.find(self.path)))
        return self._list_glob() if path_type == "glob" else None

    def _list_glob(self) -> RemoteListing:
        matches = self.system.glob(self.path, detail=True)
        paths = {path for path, entry in matches.items() if entry["type"] in ("file", "link")}
        for folder in find_outermost_folders(path for path, entry in matches.items() if entry["type"] == "directory"):
            paths.update(self.system.find(folder))
        before, link, after = split_chain(self.url)
        head, query = split_query(link)
        protocol, mark, path = head.rpartition("://")
        folder_url = f"{before}{protocol}{mark}{_get_fixed_part(path)}{query}{after}"
        return RemoteListing(_get_fixed_part(self.path), folder_url, list(paths))


def _get_fixed_part(path: str) -> str:
    """Return the components of a path before the first one with a wildcard."""
    return "/".join(takewhile(lambda part: not has_magic(part), path.split("/")))


def connect(url: str, name: str) -> RemoteFiles:
    """Return the files at a URL. `name` is the URL without secrets. Raises TableError and the errors of fsspec."""
    return RemoteFiles(*connect_to(url, name, TableError), url)


class RemoteErrors:
    """Translates the errors of fsspec and its clients into TableError, ServiceError or StorageError.

    TableError and ServiceError do not chain the original error, whose message may contain a URL with its signature.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._temporary = temporary_file_errors(reads=True)  # downloads write to the temporary folder

    def __enter__(self) -> None:
        self._temporary.__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        self._temporary.__exit__(*exc_info)
        error = exc_info[1]
        if isinstance(error, Exception) and not isinstance(error, (BatchInferError, MemoryError)):
            raise _translate(self._name, error) from None


def _translate(name: str, error: Exception) -> TableError | ServiceError:
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return TableError(f"{name}: no such file or folder")
    if isinstance(error, PermissionError):
        return TableError(f"{name}: no permission to read it: {describe(error)}")
    if isinstance(error, (ValueError, TypeError, RuntimeError)) or not is_service_error(error):
        return TableError(f"{name} cannot be opened: {describe(error)}")
    if is_refusal(error):
        return TableError(f"{name}: the server refuses it: {describe(error)}")
    return ServiceError(f"could not fetch {name}: {describe(error)}; run again")
