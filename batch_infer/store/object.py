"""Store OUT in an object store."""

from __future__ import annotations

import copy
import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TextIO, TypeVar

from batch_infer.errors import SettingsError, StoppedError, StorageError
from batch_infer.store.clients import StorageErrors
from batch_infer.store.lease import LEASE, LEASE_SECONDS, Lease, LeaseObject, LeaseReader
from batch_infer.store.logfile import open_log
from batch_infer.store.protocol import PrivateFile, Store, StoreAddress
from batch_infer.store.service import open_service, parse_location
from batch_infer.store.spool import DownloadCache, Spool, collect_abandoned, make_log_name, upload_while_open
from batch_infer.store.temporary import temporary_file_errors

if TYPE_CHECKING:
    import pyarrow as pa

THREADS = 32
"""Maximum number of concurrent requests, except for those of the lease and of logs."""
BATCH = 256
"""Number of files after which `remove_folder` checks whether to stop."""
LISTINGS_AHEAD = 8
DOWNLOADS_AHEAD = 64

T = TypeVar("T")


class ObjectStore:
    """OUT as objects of a service with conditional puts, below a URL. https://filesystem-spec.readthedocs.io

    Each file is one object, which a put replaces whole. The library repeats requests that fail. Images are kept in a
    local spool until they are published, and parts are downloaded to it once. The lock is a lease (see `Lease`).
    Credentials and endpoints come from environment variables and configuration files, as the libraries read them.
    """

    def __init__(self, address: StoreAddress, lease_seconds: float = LEASE_SECONDS) -> None:
        """Open the store at an address, without a request. With a marker, `check` reads that lease.

        Raises SettingsError, StorageError.
        """
        self.location = parse_location(address.location)
        self._system, self._root, self._conditional = open_service(self.location)
        self._lease_seconds = lease_seconds
        self._lease = LeaseObject(self.location, self._system, self._conditional, self._path(LEASE))
        self._lock: Lease | LeaseReader | None = LeaseReader(self._lease, address.marker) if address.marker else None
        self._marker = address.marker
        self._spool = Spool(self.location)
        self._pool = ThreadPoolExecutor(THREADS, "storage")
        self._cache = DownloadCache(self._spool.folder / "parts", self._download, self._pool)

    @property
    def address(self) -> StoreAddress:
        return StoreAddress(self.location, marker=self._marker)

    def locate(self, name: str) -> str:
        return f"{self.location}/{name}" if name else self.location

    def _path(self, name: str) -> str:
        """Return the path of a file in fsspec's file system."""
        return f"{self._root}/{name}" if name else self._root

    def check(self) -> None:
        if self._lock is not None:
            self._lock.check()

    # Files

    def exists(self, name: str) -> bool:
        return self._get_type(name) is not None

    def _get_type(self, name: str) -> str | None:
        """Return "file" or "directory", or None if a file is missing."""
        with suppress(FileNotFoundError), StorageErrors("read", self.locate(name)):
            return str(self._system.info(self._path(name))["type"])
        return None

    def list_folder(self, folder: str) -> list[str]:
        files, folders = self._list_entries(folder)
        return sorted({PurePosixPath(name).name for name in (*files, *folders)})

    def _list_entries(self, folder: str) -> tuple[Sequence[str], Sequence[str]]:
        """Return the names of the files and of the folders in a folder, which may be missing."""
        path = self._path(folder)
        entries = []
        with suppress(FileNotFoundError), StorageErrors("list", self.locate(folder)):
            entries = self._system.ls(path, detail=True)
        names: dict[bool, dict[str, None]] = {True: {}, False: {}}
        for entry in entries:
            name = entry["name"].rstrip("/").removeprefix(f"{path}/")
            # The folder itself is listed if it is a file, or if a console has made an empty object to show it.
            if name != path and name and "/" not in name:
                names[entry["type"] == "directory"][f"{folder}/{name}" if folder else name] = None
        return tuple(names[False]), tuple(names[True])

    def find(self, folders: Iterable[str], is_match: Callable[[str], bool]) -> Iterator[str]:
        for folder in folders:
            listings = self._walk(folder) if folder else [self._list_entries("")]
            for files, _ in listings:
                yield from (name for name in files if is_match(PurePosixPath(name).name))

    def _walk(self, folder: str) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
        """Yield the files and folders in a folder and in each folder below it, and list a few of them ahead."""
        waiting, running = deque([folder]), deque()  # type: ignore[var-annotated]
        while waiting or running:
            while waiting and len(running) < LISTINGS_AHEAD:
                running.append(self._pool.submit(self._list_entries, waiting.popleft()))
            files, folders = running.popleft().result()
            waiting.extend(folders)
            yield files, folders

    def read(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError), StorageErrors("read", self.locate(name)):
            return bytes(self._system.cat_file(self._path(name), max_concurrency=1))  # more need the size first
        return None

    @contextmanager
    def open_file(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a local copy, which is kept for the next time. Raises FileNotFoundError, StorageError."""
        import pyarrow as pa

        with self._cache.pinned(name) as path:
            file = pa.OSFile(str(path))
        with file:
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
                self._system.get_file(self._path(name), str(path))
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.locate(name)) from None

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        with self._spool.new_path(PurePosixPath(name).name) as path:
            yield path
            self._put(path, name)

    def _put(self, path: Path, name: str) -> None:
        with StorageErrors("write", self.locate(name)):
            self._system.put_file(str(path), self._path(name))

    def create(self, name: str, content: bytes) -> bool:
        """Store a file unless it exists. Returns False too if it was stored but the response was lost."""
        with StorageErrors("write", self.locate(name)):
            return self._conditional.create(self._path(name), content) is not None

    def rename(self, name: str, new_name: str) -> None:
        """Copy a file within the service and remove it. After a crash, both may exist."""
        try:
            self._copy(name, new_name)
        except FileNotFoundError:
            raise StorageError(f"cannot rename {self.locate(name)}: it is missing") from None
        self.remove([name])

    def _copy(self, name: str, new_name: str) -> None:
        with StorageErrors("copy", self.locate(name)):
            self._conditional.copy(self._path(name), self._path(new_name))

    def remove(self, names: Iterable[str]) -> None:
        self._run_all(self._remove, (name for name in names if _is_inside(name)))

    def _remove(self, name: str) -> None:
        self._cache.discard(name)
        with suppress(FileNotFoundError), StorageErrors("remove", self.locate(name)):
            self._system.rm_file(self._path(name))

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
            self._run_all(self._remove, (path for folder in same_depth for path in (f"{folder}/", folder)))

    def _run_all(self, function: Callable[[T], object], items: Iterable[T]) -> None:
        """Call a function for all items, several at once. Raises the first error, after the calls that have begun."""
        iterator = iter(items)
        while batch := list(islice(iterator, BATCH)):
            futures = [self._pool.submit(function, item) for item in batch]
            wait(futures, return_when=FIRST_EXCEPTION)
            started = [future for future in futures if not future.cancel()]
            wait(started)
            for future in started:
                future.result()

    def remove_empty_folder(self, name: str) -> None:
        """Object stores have no empty folders."""

    def check_kinds(self, folders: Sequence[str], files: Sequence[str]) -> None:
        """An object may have the name of a folder, so nothing is refused."""

    def contains(self, table: str, names: Iterable[str]) -> bool:
        return any(f"{table}/".startswith(f"{self.locate(name)}/") for name in names)

    def is_link(self, name: str) -> bool:
        return False

    # Images

    def is_case_sensitive(self, folder: str) -> bool:
        return True

    def has_image(self, name: str) -> bool:
        return _is_inside(name) and self._get_type(name) == "file"

    def read_image(self, name: str, length: int | None = None) -> bytes | None:
        content = self.read(name) if _is_inside(name) else None
        return content if content is not None and length in (None, len(content)) else None

    def stage(self, name: str, content: bytes) -> None:
        self._spool.stage(name, content)

    def publish(self, names: Sequence[str]) -> None:
        self._run_all(self._publish, names)

    def _publish(self, name: str) -> None:
        path = self._spool.staged_path(name)
        if not path.exists():
            raise StorageError(f"cannot write {self.locate(name)}: its copy in {self._spool.folder} is missing")
        self._put(path, name)
        path.unlink(missing_ok=True)

    def back_up(self, backups: Mapping[str, str]) -> None:
        self._run_all(self._back_up, backups.items())

    def _back_up(self, names: tuple[str, str]) -> None:
        image, backup = names
        if not self.has_image(backup):
            with suppress(FileNotFoundError):
                self._copy(image, backup)

    # The lock

    @contextmanager
    def locked(self) -> Iterator[Store]:
        self._collect_logs()
        lease = Lease(self._lease, self._lease_seconds)
        with lease.hold():
            store = copy.copy(self)
            store._lock, store._marker = lease, lease.token
            yield store

    def find_holder(self) -> str | None:
        return self._lease.find_holder()

    # Other files

    @contextmanager
    def open_log(self, name: str) -> Iterator[TextIO]:
        """Open a local file, and upload it every minute and at the end, under a name that no other process uses.

        Errors in uploading are ignored, as they would mask the original exception. The log of a process that is killed
        is uploaded by the next process of this machine that opens or closes a log or locks OUT.
        """
        self._collect_logs()
        unique_name = make_log_name(name)
        path = self._spool.log_path(unique_name)
        try:
            with upload_while_open(path, lambda: self._upload_log(unique_name, path)), open_log(path) as file:
                yield file
        finally:
            self._collect_logs()

    def _upload_log(self, name: str, path: Path) -> bool:
        """Return whether a log was uploaded."""
        with suppress(SettingsError, StorageError):
            self._put(path, name)
            return True
        return False

    def _collect_logs(self) -> None:
        collect_abandoned(self.location, self._upload_log)

    def now(self) -> float:
        with StorageErrors("read", self.location):
            return self._conditional.now(self._path(LEASE))

    def write_private(self, name: str, content: bytes) -> bool:
        with StorageErrors("write", self.locate(name)):
            self._system.pipe_file(self._path(name), content)
        return False

    def read_private(self, name: str) -> PrivateFile | None:
        with StorageErrors("read", self.locate(name)):
            version = self._conditional.read(self._path(name))
        return None if version is None else PrivateFile(version.content, version.modified_at, is_trusted=False)


def _is_inside(name: str) -> bool:
    """Return whether a name, which may come from an edited manifest, cannot lead out of OUT in any client."""
    return "\0" not in name and not {"", ".", ".."}.intersection(name.split("/"))


def _get_depth(name: str) -> int:
    return name.count("/")
