"""Files behind URLs, by fsspec, and the translation of its errors.

They are downloaded whole before they are read, so that every pass reads the same bytes, and the network never fails in
the middle of a pass.
"""

from __future__ import annotations

import asyncio
import traceback
from dataclasses import dataclass
from glob import has_magic
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NamedTuple

import fsspec

from batch_infer.errors import BatchInferError, ServiceError, TableError, first_line
from batch_infer.store import temporary_file_errors
from batch_infer.table.left_out import outermost_folders
from batch_infer.table.urls import HTTP, is_http, protocol_of, redact_urls, split_chain, split_query

EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gs")),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), ("adlfs", "abfss")),
    **dict.fromkeys(("http", "https"), ("aiohttp", "https")),
}
"""The package that fsspec needs for a protocol, and our extra that installs it."""
CLIENTS = frozenset(
    {
        *("aiohttp", "azure", "botocore", "ftplib", "gcsfs", "google", "http", "httpx", "huggingface_hub"),
        *("paramiko", "requests", "smbprotocol", "urllib3"),
    }
)
"""Packages of the services' clients. Many of their errors are no OSError, and fsspec does not translate them."""
REFUSALS = ("NoCredentialsError", "ClientAuthenticationError", "DefaultCredentialsError", "error_perm")
"""Errors of clients by which a service refuses the user, and which have no HTTP status."""
SILENCE_SECONDS = 60
"""How long a server may send nothing. aiohttp's default limits the whole download, which ends large ones."""


class RemoteListing(NamedTuple):
    """The files of a folder or glob: path and URL of the folder, and fsspec's paths of the files."""

    folder: str
    url: str
    paths: list[str]


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """A file, folder or glob behind a URL. `path` is its path in fsspec's `system`; `url` may hold a secret."""

    system: Any
    path: str
    url: str

    def list_files(self) -> RemoteListing | None:
        """List a folder or glob; return None for a single file. A name with brackets is a file before it is a glob."""
        if is_http(split_chain(self.url)[1]):
            return None
        try:
            kind = self.system.info(self.path)["type"]
        except FileNotFoundError:
            if not has_magic(self.path):
                raise
            kind = "glob"
        if kind == "directory":
            return RemoteListing(self.path.rstrip("/"), self.url, list(self.system.find(self.path)))
        return self._list_glob() if kind == "glob" else None

    def _list_glob(self) -> RemoteListing:
        matches = self.system.glob(self.path, detail=True)
        paths = {path for path, entry in matches.items() if entry["type"] in ("file", "link")}
        for folder in outermost_folders(path for path, entry in matches.items() if entry["type"] == "directory"):
            paths.update(self.system.find(folder))
        before, link, after = split_chain(self.url)
        head, query = split_query(link)
        protocol, mark, path = head.rpartition("://")
        folder_url = f"{before}{protocol}{mark}{_fixed_part(path)}{query}{after}"
        return RemoteListing(_fixed_part(self.path), folder_url, list(paths))


def _fixed_part(path: str) -> str:
    """Return a path up to its first part with a wildcard."""
    parts = path.split("/")
    return "/".join(parts[: next((i for i, part in enumerate(parts) if has_magic(part)), len(parts))])


def connect(url: str, name: str) -> RemoteFiles:
    """Return the files behind a URL; `name` is the URL without secrets. Raises TableError, and errors of fsspec."""
    protocol = protocol_of(url) or ""
    package, extra = EXTRAS.get(protocol, (None, None))
    if package is not None and find_spec(package) is None:
        raise TableError(f"{name}: reading {protocol}:// needs {package}: pip install 'batch-infer[{extra}]'")
    if is_http(url):
        from fsspec.implementations import http

        system = http.HTTPFileSystem(**_http_options(), use_listings_cache=False, skip_instance_cache=True)
        return RemoteFiles(system, url, url)
    inner = {protocol_of(link) for link in url.split("::")[1:]}
    options: dict[str, Any] = {name: _http_options() for name in inner if name in HTTP}
    try:
        try:  # a listing must not be older than this run
            system, path = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
        except TypeError:  # a protocol that does not take these options
            system, path = fsspec.url_to_fs(url, **options)
        return RemoteFiles(system, path, url)
    except ImportError as error:
        raise TableError(f"{name}: reading {protocol}:// needs another package: {first_line(error)}") from error


def _http_options() -> dict[str, Any]:
    from fsspec.implementations import http

    timeout = http.aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    # No compression in transit: the client would decompress a .csv.gz too.
    return {"client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}}


class RemoteErrors:
    """A context that translates errors of fsspec and its file systems into TableError, ServiceError or StorageError.

    Any exception may come: each file system has its own client. The cause is dropped, since a library's error may
    contain the whole URL, and a URL may contain a signature.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._temporary = temporary_file_errors(reads=True)  # a chain may keep copies

    def __enter__(self) -> None:
        self._temporary.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._temporary.__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, (BatchInferError, MemoryError)):
            raise _translate(self._name, error) from None


def _translate(name: str, error: Exception) -> TableError | ServiceError:
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return TableError(f"{name}: no such file or folder")
    if isinstance(error, PermissionError):
        return TableError(f"{name}: no permission to read it: {_reason(error)}")
    if isinstance(error, (ValueError, TypeError, RuntimeError)) or not _is_service_error(error):
        return TableError(f"{name} cannot be opened: {_reason(error)}")
    status = _http_status(error)
    is_refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    if is_refused or type(error).__name__ in REFUSALS:
        return TableError(f"{name}: the server refuses it: {_reason(error)}")
    return ServiceError(f"could not fetch {name}: {_reason(error)}; run again")


def _is_service_error(error: Exception) -> bool:
    """Return whether an error is of the network or a service, rather than of what is read, such as an archive."""
    modules = {kind.__module__ for kind in type(error).__mro__}
    if isinstance(error, EOFError):  # ftplib raises it where a server hangs up, gzip where a file is cut off
        modules |= {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
    packages = {module.partition(".")[0] for module in modules}
    return isinstance(error, (OSError, asyncio.TimeoutError)) or bool(packages & CLIENTS)


def _http_status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    for holder, name in ((error, "status"), (error, "status_code"), (response, "status_code"), (error, "code")):
        if isinstance(status := getattr(holder, name, None), int):
            return status
    return None


def _reason(error: Exception) -> str:
    if (status := _http_status(error)) is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    text, kind = redact_urls(first_line(error)), type(error).__name__
    if text == kind or "?" in text or "@" in text:
        return kind
    return f"{kind}: {text}" if isinstance(error, (LookupError, AttributeError, AssertionError)) else text
