"""Keep local copies of parts that were downloaded, up to a total size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from batch_infer.store.temporary import temporary_file_errors

if TYPE_CHECKING:
    import pyarrow as pa

CACHED_BYTES = 1 << 30
"""Maximum total size in bytes of downloaded parts, except that parts in use are kept."""


@dataclass(eq=False, slots=True)
class LocalCopy:
    """A local copy of an object. `size` is 0 until it is complete, and `download` ends then."""

    path: Path
    size: int = 0
    download: Future[None] = field(default_factory=Future)


class DownloadCache:
    """Downloads objects that never change, in advance if required, and keeps the last ones up to CACHED_BYTES.

    Another program may remove files from the folder, which is temporary. They are then downloaded again.
    """

    def __init__(self, folder: Path, download: Callable[[str, Path], None], pool: Executor) -> None:
        self._folder, self._download, self._pool = folder, download, pool
        self._copies: OrderedDict[str, LocalCopy] = OrderedDict()
        self._bytes = 0
        self._count = 0
        self._lock = threading.RLock()

    def request(self, name: str) -> LocalCopy:
        """Begin to download an object unless it is cached or being downloaded."""
        with self._lock:
            copy = self._copies.get(name)
            if copy is None or (copy.download.done() and copy.download.exception() is not None):
                self._count += 1
                copy = self._copies[name] = LocalCopy(self._folder / str(self._count))
                copy.download = self._pool.submit(self._fetch, name, copy)
            self._copies.move_to_end(name)
            return copy

    def open(self, name: str) -> pa.NativeFile:
        """Download an object unless it is cached, and open its copy. Raises FileNotFoundError, StorageError."""
        import pyarrow as pa

        while True:
            copy = self.request(name)
            copy.download.result()
            with self._lock:  # an eviction waits
                try:
                    return pa.OSFile(str(copy.path))
                except FileNotFoundError:  # evicted since then, or removed by another program
                    if self._copies.get(name) is copy:
                        self.discard(name)

    def _fetch(self, name: str, copy: LocalCopy) -> None:
        with temporary_file_errors():
            self._folder.mkdir(exist_ok=True)
        self._download(name, copy.path)
        with self._lock:
            if self._copies.get(name) is not copy:  # discarded in the meantime
                _remove(copy.path)
                return
            with temporary_file_errors():
                copy.size = copy.path.stat().st_size
            self._bytes += copy.size
            self._evict(name)

    def _evict(self, name: str) -> None:
        """Remove the least recently used copies if there are too many, but not that of `name`."""
        for other, copy in list(self._copies.items()):
            if self._bytes <= CACHED_BYTES:
                return
            if other != name and copy.size > 0:
                self.discard(other)

    def discard(self, name: str) -> None:
        """Remove an object from the cache, for example because it was removed from OUT."""
        with self._lock:
            copy = self._copies.pop(name, None)
            if copy is not None:
                self._bytes -= copy.size
                _remove(copy.path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # Windows cannot remove a file that is open
        path.unlink()
