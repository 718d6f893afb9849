"""Tables that lie elsewhere, by fsspec: found, and fetched whole when they are opened.

So every later pass reads the same bytes, and no fault of the network falls into the middle of a walk.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from glob import has_magic
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import fsspec

from batch_infer.errors import BatchInferError, ServiceError, TableError, first_line
from batch_infer.store import temporary_file_errors
from batch_infer.table.endings import TableFile, plain_stem, read_ending, unknown_ending
from batch_infer.table.scratch import Scratch
from batch_infer.table.selection import LeftOut, holds_no_table, outermost, tables_among
from batch_infer.table.text import clean
from batch_infer.table.urls import (
    HTTP,
    is_http,
    join_url,
    protocol_of,
    redact_url,
    redact_urls,
    split_chain,
    split_query,
)

EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", "s3")),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "gs")),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), ("adlfs", "abfss")),
    **dict.fromkeys(("http", "https"), ("aiohttp", "https")),
}
"""Protocol -> the package that fsspec wants for it, and our extra that brings it."""

CLIENTS = frozenset(
    {
        *("aiohttp", "azure", "botocore", "ftplib", "gcsfs", "google", "http", "httpx", "huggingface_hub"),
        *("paramiko", "requests", "smbprotocol", "urllib3"),
    }
)
"""Packages of the services' clients. Many of their errors are no OSError, and fsspec lets them through."""
REFUSALS = ("NoCredentialsError", "ClientAuthenticationError", "DefaultCredentialsError", "error_perm")
"""Errors of clients by which a service refuses the user, and which have no HTTP status."""

SILENCE_S = 60
"""How long a server may send nothing. aiohttp's own limit is on the whole file, and ends large ones."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a URL points. `path` is fsspec's name for it; `url` may hold a secret, and `name` is without it."""

    files: Any
    path: str
    url: str

    @property
    def name(self) -> str:
        return clean(redact_url(self.url))


@dataclass(frozen=True, slots=True)
class _Found:
    """A file: fsspec's path to it, its URL and name, and its path relative to the argument, unless it is the argument.

    The URL may hold a secret.
    """

    path: str
    url: str
    name: str
    relative: str
    is_named: bool = False


def fetch(url: str, scratch: Scratch, left_out: LeftOut) -> list[TableFile]:
    """The tables that a URL means; `left_out` takes in the files of a folder or glob that are none.

    Raises TableError where it means no table, ServiceError where a service does not answer, StorageError where
    the temporary folder is full.
    """
    name = clean(redact_url(url))
    with _Blamed(name), temporary_file_errors(reads=True):  # a chain may keep copies
        place = _connect(url, name)
        link = split_chain(name)[1]
        found = list(_single(place, link) if is_http(link) else _listed(place, left_out))
    if not found:
        raise TableError(holds_no_table(name, left_out))
    return [_fetch(place, file, scratch) for file in found]


def _connect(url: str, name: str) -> _Place:
    protocol = protocol_of(url) or ""
    package, extra = EXTRAS.get(protocol, (None, None))
    if package is not None and find_spec(package) is None:
        raise TableError(f"{name}: reading {protocol}:// needs {package}: pip install 'batch-infer[{extra}]'")
    if is_http(url):
        from fsspec.implementations import http

        client = _http_options()
        return _Place(http.HTTPFileSystem(**client, use_listings_cache=False, skip_instance_cache=True), url, url)
    inner = {protocol_of(link) for link in url.split("::")[1:]}
    options: dict[str, Any] = {name: _http_options() for name in inner if name in HTTP}
    try:
        try:  # a listing must not be older than this run
            files, path = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
        except TypeError:  # a protocol that does not take these options
            files, path = fsspec.url_to_fs(url, **options)
        return _Place(files, path, url)
    except ImportError as error:
        raise TableError(f"{name}: reading {protocol}:// needs another package: {first_line(error)}") from error


def _http_options() -> dict[str, Any]:
    from fsspec.implementations import http

    timeout = http.aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    # Not compressed on the way: what the server unpacks is not what its name says.
    client = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}
    return {"client_kwargs": client}


def _single(place: _Place, link: str) -> Iterator[_Found]:
    relative = link.rpartition("/")[2]
    if read_ending(relative) is None:
        raise TableError(f"{place.name}: {unknown_ending(relative)}")
    url = place.url.partition("#")[0] if is_http(place.url) else place.url  # a fragment is not sent
    yield _Found(place.path, url, place.name, relative, is_named=True)


def _listed(place: _Place, left_out: LeftOut) -> Iterator[_Found]:
    """The tables of a file, a folder or a glob; a name with brackets is a file before it is a glob."""
    try:
        kind = place.files.info(place.path)["type"]
    except FileNotFoundError:
        if not has_magic(place.path):
            raise
        kind = "glob"
    if kind == "directory":
        base = place.path.rstrip("/")
        yield from _below(place, base, place.url, place.files.find(place.path), left_out)
    elif kind == "glob":
        parts = place.path.split("/")
        first = next(i for i, part in enumerate(parts) if has_magic(part))
        matches = place.files.glob(place.path, detail=True)
        paths = {path for path, entry in matches.items() if entry["type"] in ("file", "link")}
        for folder in outermost(path for path, entry in matches.items() if entry["type"] == "directory"):
            paths.update(place.files.find(folder))
        yield from _below(place, "/".join(parts[:first]), _fixed(place.url), paths, left_out)
    else:
        yield from _single(place, split_chain(place.name)[1])


def _below(place: _Place, base: str, url: str, paths: Iterable[str], left_out: LeftOut) -> Iterator[_Found]:
    @cache
    def holds_run(inner: str) -> bool:
        return bool(place.files.isfile("/".join(filter(None, [base, inner, "run.json"]))))

    def name_of(relative: str) -> str:
        return clean(join_url(redact_url(url), relative))

    ordered = sorted(paths, key=lambda path: path.split("/"))  # as pathlib sorts
    by_relative = {path[len(base) :].lstrip("/"): path for path in ordered}
    for relative in tables_among(by_relative, holds_run, name_of, left_out):
        yield _Found(by_relative[relative], join_url(url, relative), name_of(relative), relative)


def _fixed(url: str) -> str:
    """A URL up to its first part with magic."""
    before, link, after = split_chain(url)
    head, query = split_query(link)
    protocol, mark, rest = head.rpartition("://")
    parts = rest.split("/")
    first = next((i for i, part in enumerate(parts) if has_magic(part)), len(parts))
    return f"{before}{protocol}{mark}{'/'.join(parts[:first])}{query}{after}"


def _fetch(place: _Place, found: _Found, scratch: Scratch) -> TableFile:
    """A file of its own, or its fault: one that is gone or forbidden leaves the others readable."""
    path, stem = scratch.place(), plain_stem(found.relative)
    file = TableFile(path, clean(found.name), stem, origin="url", is_named=found.is_named, url=found.url)
    ending = read_ending(found.relative)
    if ending is None:
        return replace(file, fault=unknown_ending(file.name))
    try:
        with _Blamed(file.name), temporary_file_errors(reads=True):
            place.files.get_file(found.path, str(file.path))
    except TableError as error:
        return replace(file, fault=str(error))
    return replace(file, format=ending.format, packing=ending.packing)


class _Blamed:
    """Translate errors of fsspec and its file systems into TableError or ServiceError.

    Any exception may come: each file system has its own client. The cause is dropped: a library's error may contain
    the whole URL, and a URL may contain a signature.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, (BatchInferError, MemoryError)):
            raise _translated(self._name, error) from None


def _translated(name: str, error: Exception) -> TableError | ServiceError:
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return TableError(f"{name}: no such file or folder")
    if isinstance(error, PermissionError):
        return TableError(f"{name}: no permission to read it: {_reason(error)}")
    if isinstance(error, (ValueError, TypeError, RuntimeError)) or not _is_of_service(error):
        return TableError(f"{name} cannot be opened: {_reason(error)}")
    status = _status(error)
    refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    if refused or type(error).__name__ in REFUSALS:
        return TableError(f"{name}: the server refuses it: {_reason(error)}")
    return ServiceError(f"could not fetch {name}: {_reason(error)}; run again")


def _is_of_service(error: Exception) -> bool:
    """Return whether an error is of the network or a service, rather than of what is read, such as an archive."""
    modules = {kind.__module__ for kind in type(error).__mro__}
    if isinstance(error, EOFError):  # what ftplib raises where a server hangs up, and gzip where a file is cut off
        modules |= {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
    packages = {module.partition(".")[0] for module in modules}
    return isinstance(error, (OSError, asyncio.TimeoutError)) or bool(packages & CLIENTS)


def _status(error: Exception) -> int | None:
    """The HTTP status of a client's error."""
    response = getattr(error, "response", None)
    for holder, name in ((error, "status"), (error, "status_code"), (response, "status_code"), (error, "code")):
        if isinstance(status := getattr(holder, name, None), int):
            return status
    return None


def _reason(error: Exception) -> str:
    if (status := _status(error)) is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    text, kind = redact_urls(first_line(error)), type(error).__name__
    if text == kind or "?" in text or "@" in text:
        return kind
    return f"{kind}: {text}" if isinstance(error, (LookupError, AttributeError, AssertionError)) else text
