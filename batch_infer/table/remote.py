"""List and download files behind URLs with fsspec, and translate its errors.

Files are downloaded before they are read, so that all passes read the same bytes and none fails because of the network.
"""

from __future__ import annotations

import asyncio
import traceback
from dataclasses import dataclass
from glob import has_magic
from importlib.util import find_spec
from itertools import takewhile
from typing import Any, NamedTuple

import fsspec

from batch_infer.errors import BatchInferError, ServiceError, TableError, first_line
from batch_infer.store import temporary_file_errors
from batch_infer.table.selection import find_outermost_folders
from batch_infer.table.urls import HTTP_PROTOCOLS, get_protocol, is_http, redact_urls, split_chain, split_query

EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gs")),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), ("adlfs", "abfss")),
    **dict.fromkeys(("http", "https"), ("aiohttp", "https")),
}
"""The package that fsspec needs for each protocol, and the extra of batch-infer that installs it."""
CLIENTS = {
    *("aiohttp", "azure", "botocore", "ftplib", "gcsfs", "google", "http", "httpx", "huggingface_hub", "paramiko"),
    *("requests", "smbprotocol", "urllib3"),
}
"""Client packages of services. Their errors, many of which are not OSErrors, also mean that a service failed."""
ACCESS_ERRORS = ("NoCredentialsError", "ClientAuthenticationError", "DefaultCredentialsError", "error_perm")
"""Class names of errors without an HTTP status that clients raise if a service refuses access."""
READ_TIMEOUT_SECONDS = 60
"""Timeout for each connection and read. aiohttp's default limits the total time and so aborts large downloads."""


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
    protocol = get_protocol(url) or ""
    package, extra = EXTRAS.get(protocol, (None, None))
    if package is not None and find_spec(package) is None:
        raise TableError(f"{name}: reading {protocol}:// needs {package}: pip install 'batch-infer[{extra}]'")
    if is_http(url):
        from fsspec.implementations import http

        system = http.HTTPFileSystem(**_make_http_options(), use_listings_cache=False, skip_instance_cache=True)
        return RemoteFiles(system, url, url)
    inner = HTTP_PROTOCOLS.intersection(map(get_protocol, url.split("::")[1:]))
    options: dict[str, Any] = {scheme: _make_http_options() for scheme in inner}
    try:
        try:  # a cached listing could be older than this run
            system, path = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
        except TypeError:  # the file system of this protocol does not accept these options
            system, path = fsspec.url_to_fs(url, **options)
        return RemoteFiles(system, path, url)
    except ImportError as error:
        raise TableError(f"{name}: reading {protocol}:// needs another package: {first_line(error)}") from error


def _make_http_options() -> dict[str, Any]:
    from fsspec.implementations import http

    timeout = http.aiohttp.ClientTimeout(total=None, sock_connect=READ_TIMEOUT_SECONDS, sock_read=READ_TIMEOUT_SECONDS)
    # With compression in transit, the client would also decompress a .csv.gz.
    return {"client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}}


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
        return TableError(f"{name}: no permission to read it: {_describe(error)}")
    if isinstance(error, (ValueError, TypeError, RuntimeError)) or not _is_service_error(error):
        return TableError(f"{name} cannot be opened: {_describe(error)}")
    status = _get_http_status(error)
    is_refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    if is_refused or type(error).__name__ in ACCESS_ERRORS:
        return TableError(f"{name}: the server refuses it: {_describe(error)}")
    return ServiceError(f"could not fetch {name}: {_describe(error)}; run again")


def _is_service_error(error: Exception) -> bool:
    """Return whether an error comes from the network or a service, not from content such as an archive."""
    modules = {base.__module__ for base in type(error).__mro__}
    if isinstance(error, EOFError):  # see whether ftplib (the server hung up) or gzip (a file is cut off) raised it
        modules |= {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
    packages = {module.partition(".")[0] for module in modules}
    return isinstance(error, (OSError, asyncio.TimeoutError)) or bool(packages & CLIENTS)


def _get_http_status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    for owner, name in ((error, "status"), (error, "status_code"), (response, "status_code"), (error, "code")):
        if isinstance(status := getattr(owner, name, None), int):
            return status
    return None


def _describe(error: Exception) -> str:
    if (status := _get_http_status(error)) is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    text, name = redact_urls(first_line(error)), type(error).__name__
    if text == name or "?" in text or "@" in text:
        return name
    return f"{name}: {text}" if isinstance(error, (LookupError, AttributeError, AssertionError)) else text
