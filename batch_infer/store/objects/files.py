"""Keep files as the objects of a service: read, write, list and remove them."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from batch_infer.errors import StoppedError, StorageError
from batch_infer.store.clients import StorageErrors
from batch_infer.store.objects.downloads import DownloadCache
from batch_infer.store.objects.service import SERVICES, open_service, parse_location
from batch_infer.store.objects.spool import Spool
from batch_infer.store.protocol import is_inside
from batch_infer.store.temporary import temporary_file_errors
from batch_infer.store.urls import get_protocol, split_query

if TYPE_CHECKING:
    import pyarrow as pa

THREADS = 32
"""Maximum number of concurrent requests, except for those of the lease and of logs."""
BATCH = 256
"""Number of files after which `remove_folder` checks whether to stop."""
LISTINGS_AHEAD = 8
DOWNLOADS_AHEAD = 64
Listing: TypeAlias = tuple[Sequence[str], Sequence[str]]
"""The names of the files and of the folders in a folder."""

T = TypeVar("T")


class ObjectFiles:
    """The half of ObjectStore that implements the methods of a store for files.

    Each request that changes an object of OUT, except a log, follows a `check` of the lock. A put, copy or removal that
    has begun is not stopped, so that a process that is suspended in the middle may still make up to THREADS changes.
    The libraries repeat requests that fail. Listings are not cached.
    """

    def __init__(self, location: str) -> None:
        """Connect to the service of OUT, without a request. Raises SettingsError, StorageError."""
        self.location = parse_location(location)
        self.system, self._root, self.puts = open_service(self.location)
        self.spool = Spool(self.location)
        self.pool = ThreadPoolExecutor(THREADS, "storage")
        self._cache = DownloadCache(self.spool.folder / "parts", self._download, self.pool)

    def check(self) -> None:
        """Check the lock. A store without a lock has nothing to check."""

    def locate(self, name: str) -> str:
        return f"{self.location}/{name}" if name else self.location

    def get_path(self, name: str) -> str:
        """Return the path of a file in fsspec's file system."""
        return f"{self._root}/{name}" if name else self._root

    def exists(self, name: str) -> bool:
        return self.get_type(name) is not None

    def get_type(self, name: str) -> str | None:
        """Return "file" or "directory", or None if a file is missing."""
        with suppress(FileNotFoundError), StorageErrors("read", self.locate(name)):
            return str(self.system.info(self.get_path(name))["type"])
        return None

    def list_folder(self, folder: str) -> list[str]:
        files, folders = self._list_entries(folder)
        return sorted({PurePosixPath(name).name for name in (*files, *folders)})

    def list_images(self, folder: str) -> set[str]:
        return {PurePosixPath(name).name for name in self._list_entries(folder)[0]}

    def _list_entries(self, folder: str) -> Listing:
        files, folders = self.list_sizes(folder)
        return tuple(files), tuple(folders)

    def list_sizes(self, folder: str) -> tuple[dict[str, int], list[str]]:
        """Return the files in a folder, which may be missing, with their sizes, and the folders in it."""
        path = self.get_path(folder)
        entries = []
        with suppress(FileNotFoundError), StorageErrors("list", self.locate(folder)):
            entries = self.system.ls(path, detail=True)
        files: dict[str, int] = {}
        folders: dict[str, None] = {}
        for entry in entries:
            name = entry["name"].rstrip("/").removeprefix(f"{path}/")
            # The folder itself is listed if it is a file, or if a console has made an empty object to show it.
            if name != path and name and "/" not in name:
                child = f"{folder}/{name}" if folder else name
                if entry["type"] == "directory":
                    folders[child] = None
                else:
                    files[child] = entry["size"] or 0
        return files, list(folders)

    def find(self, folders: Iterable[str], is_match: Callable[[str], bool]) -> Iterator[str]:
        for folder in folders:
            listings = self._walk(folder) if folder else [self._list_entries("")]
            for files, _ in listings:
                yield from (name for name in files if is_match(PurePosixPath(name).name))

    def _walk(self, folder: str) -> Iterator[Listing]:
        """Yield the files and folders in a folder and in each folder below it, and list a few of them ahead."""
        waiting: deque[str] = deque([folder])
        running: deque[Future[Listing]] = deque()
        while waiting or running:
            while waiting and len(running) < LISTINGS_AHEAD:
                running.append(self.pool.submit(self._list_entries, waiting.popleft()))
            files, folders = running.popleft().result()
            waiting.extend(folders)
            yield files, folders

    def read(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError), StorageErrors("read", self.locate(name)):
            # Not with cat_file: that of s3fs repeats all attempts of a request, so that an outage takes ten minutes.
            version = self.puts.read(self.get_path(name))
            return None if version is None else version.content
        return None

    @contextmanager
    def open_file(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a local copy, which is kept for the next time. Raises FileNotFoundError, StorageError."""
        with self._cache.open(name) as file:
            yield file

    def prefetch(self, names: Iterable[str]) -> Iterator[str]:
        waiting: deque[str] = deque()
        for name in names:
            self._cache.request(name)
            waiting.append(name)
            if len(waiting) > DOWNLOADS_AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _download(self, name: str, path: Path) -> None:
        try:
            with StorageErrors("read", self.locate(name)), temporary_file_errors(reads=True):
                self.system.get_file(self.get_path(name), str(path))
        except FileNotFoundError:
            if not path.parent.exists():
                raise self.spool.make_missing_error(f"cannot read {self.locate(name)}", path) from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.locate(name)) from None

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        with self.spool.new_path(PurePosixPath(name).name) as path:
            yield path
            self.put(path, name)

    def put(self, path: Path, name: str) -> None:
        """Store a local file. Raises StorageError also if another program has removed it from the spool."""
        self.check()
        self.put_unchecked(path, name)

    def put_unchecked(self, path: Path, name: str) -> None:
        """Store a local file whether or not this process holds the lock, as for logs, which have unique names."""
        with StorageErrors("write", self.locate(name)):
            try:
                self.system.put_file(str(path), self.get_path(name))
            except FileNotFoundError:
                if path.exists():  # the bucket is missing
                    raise
                raise self.spool.make_missing_error(f"cannot write {self.locate(name)}", path) from None
        self._cache.discard(name)

    def create(self, name: str, content: bytes) -> bool:
        """Store a file unless it exists. Returns False too if it was stored but the response was lost."""
        self.check()
        with StorageErrors("write", self.locate(name)):
            return self.puts.create(self.get_path(name), content) is not None

    def rename(self, name: str, new_name: str) -> None:
        """Copy a file within the service and remove it. After a crash, both may exist."""
        try:
            self.copy(name, new_name)
        except FileNotFoundError:
            raise StorageError(f"cannot rename {self.locate(name)}: it is missing") from None
        self.remove([name])

    def copy(self, name: str, new_name: str) -> None:
        self.check()
        with StorageErrors("copy", self.locate(name)):
            self.puts.copy(self.get_path(name), self.get_path(new_name))

    def remove(self, names: Iterable[str]) -> None:
        self.run_all(self._remove, (name for name in names if is_inside(name)))

    def _remove(self, name: str) -> None:
        self.check()
        self._cache.discard(name)
        with suppress(FileNotFoundError), StorageErrors("remove", self.locate(name)):
            self.system.rm_file(self.get_path(name))

    def remove_folder(self, name: str, stop: Callable[[], bool]) -> None:
        """Remove objects below a name, the object itself, and empty objects that consoles show as folders.

        Azure accounts with a hierarchical namespace have real folders, which are removed from the deepest up.
        """
        removed = [name]
        for files, folders in self._walk(name):
            for start in range(0, max(len(files), 1), BATCH):
                if stop():
                    raise StoppedError(f"stopped while removing {self.locate(name)}; run again to continue")
                self.remove(files[start : start + BATCH])
            removed += folders
        removed.sort(key=_get_depth, reverse=True)
        for _, same_depth in groupby(removed, _get_depth):
            self.run_all(self._remove, (path for folder in same_depth for path in (f"{folder}/", folder)))

    def run_all(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        """Call a function for all items, several at once. Raises the first error, after the calls that have begun."""
        iterator = iter(items)
        while batch := list(islice(iterator, BATCH)):
            futures = [self.pool.submit(function, item) for item in batch]
            wait(futures, return_when=FIRST_EXCEPTION)
            started = [future for future in futures if not future.cancel()]
            wait(started)
            for future in started:
                future.result()

    # What only local stores have

    def check_kinds(self, folders: Sequence[str], files: Sequence[str]) -> None:
        """Accept all: an object and objects below its name do not exclude each other."""

    def is_link(self, name: str) -> bool:
        return False

    def remove_empty_folder(self, name: str) -> None:
        """Do nothing: there are no empty folders."""

    def contains(self, table: str, names: Iterable[str]) -> bool:
        """Return whether a URL, or the last link of a chain such as simplecache::s3://, leads into these names of OUT.

        The URL may have another protocol of the same service, or name the account.
        """
        link = split_query(table.rpartition("::")[2])[0]
        protocol = get_protocol(link) or ""
        if SERVICES.get(protocol) != SERVICES[get_protocol(self.location) or ""]:
            return False
        path = self.system._strip_protocol(f"{protocol}://{link.partition('://')[2]}")
        return any(f"{path}/".startswith(f"{self._root}/{name}/") for name in names)


def _get_depth(name: str) -> int:
    return name.count("/")
