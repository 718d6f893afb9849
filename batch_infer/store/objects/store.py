"""Store OUT in an object store."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TextIO

from batch_infer.errors import SettingsError, StorageError
from batch_infer.store.clients import StorageErrors
from batch_infer.store.logfile import open_log
from batch_infer.store.objects.files import ObjectFiles
from batch_infer.store.objects.lease import Lease, LeaseReader
from batch_infer.store.objects.lease_object import LEASE, LEASE_SECONDS, LeaseObject
from batch_infer.store.objects.listing import walk_sorted
from batch_infer.store.objects.spool import collect_abandoned, make_log_name, upload_while_open
from batch_infer.store.protocol import IMAGE_FOLDERS, FileDigest, PrivateFile, StoreAddress, is_inside
from batch_infer.store.temporary import temporary_file_errors


class ObjectStore(ObjectFiles):
    """Keeps OUT as objects of a service with conditional puts, below a URL. This is a Store.

    Each file is one object, which a put replaces whole. Images are kept in a local spool until they are published, and
    parts are downloaded to it once. The lock is a lease (see `Lease`). Credentials and endpoints come from environment
    variables and configuration files, as the libraries read them.
    """

    def __init__(self, address: StoreAddress, lease_seconds: float = LEASE_SECONDS) -> None:
        """Open the store at an address, without a request. With a marker, `check` reads the lease with that token.

        Raises SettingsError, StorageError.
        """
        super().__init__(address.location)
        self._lease_seconds, self._marker = lease_seconds, address.marker
        self._lease = LeaseObject(self.location, self.puts, self.get_path(LEASE))
        self._lock: Lease | LeaseReader | None = LeaseReader(self._lease, address.marker) if address.marker else None

    @property
    def address(self) -> StoreAddress:
        return StoreAddress(self.location, marker=self._marker)

    def check(self) -> None:
        if self._lock is not None:
            self._lock.check()

    # Images

    def is_case_sensitive(self, folder: str) -> bool:
        return True

    def has_image(self, name: str) -> bool:
        return is_inside(name) and self.get_type(name) == "file"

    def read_image(self, name: str, length: int | None = None) -> bytes | None:
        content = self.read(name) if is_inside(name) else None
        return content if content is not None and length in (None, len(content)) else None

    def list_image_files(self, *, needs_sizes: bool = True) -> Iterator[tuple[str, int | None]]:
        return chain.from_iterable(walk_sorted(self.list_sizes, self.pool, folder) for folder in IMAGE_FOLDERS)

    def hash_images(self, images: Sequence[tuple[str, int]]) -> list[FileDigest | None]:
        return list(self.pool.map(self._hash_image, [name for name, _ in images]))

    def _hash_image(self, name: str) -> FileDigest | None:
        content = self.read(name)
        return None if content is None else FileDigest(hashlib.sha256(content).hexdigest(), len(content))

    def stage(self, name: str, content: bytes) -> None:
        self.spool.stage(name, content)

    def publish(self, names: Sequence[str]) -> None:
        """Put staged images, several at once, and check the lock before each.

        If another run takes over in the meantime, it and this run render the same rows. Then only the puts that have
        already begun may replace images of the other run.
        """
        self.run_all(self._publish, names)

    def _publish(self, name: str) -> None:
        path = self.spool.staged_path(name)
        self.put(path, name)
        path.unlink(missing_ok=True)

    def read_staged(self, name: str) -> bytes:
        with temporary_file_errors():
            return self.spool.staged_path(name).read_bytes()

    def discard_staged(self, names: Iterable[str]) -> None:
        with temporary_file_errors():
            for name in names:
                self.spool.staged_path(name).unlink(missing_ok=True)

    def back_up(self, backups: Mapping[str, str]) -> None:
        self.run_all(self._back_up, backups.items())

    def _back_up(self, names: tuple[str, str]) -> None:
        image, backup = names
        if not self.has_image(backup):
            with suppress(FileNotFoundError):
                self.copy(image, backup)

    # The lock

    @contextmanager
    def locked(self) -> Iterator[ObjectStore]:
        self._collect_logs()
        lease = Lease(self._lease, self._lease_seconds)
        store = copy.copy(self)
        store._lock, store._marker = lease, lease.token
        try:
            with lease.hold():
                yield store
        finally:  # after the release, because a stop may leave no time for uploads
            self._collect_logs()  # of worker processes, which the engine kills at its end

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
        path = self.spool.log_path(unique_name)
        try:
            with upload_while_open(path, lambda: self._upload_log(unique_name, path)), open_log(path) as file:
                yield file
        finally:
            self._collect_logs()

    def _upload_log(self, name: str, path: Path) -> bool:
        """Return whether a log was uploaded."""
        with suppress(SettingsError, StorageError):
            self.put_unchecked(path, name)
            return True
        return False

    def _collect_logs(self) -> None:
        collect_abandoned(self.location, self._upload_log)

    def now(self) -> float:
        with StorageErrors("read", self.location):
            return self.puts.now(self.get_path(LEASE))

    @property
    def keeps_file_owners(self) -> bool:
        return False

    def write_private(self, name: str, content: bytes) -> bool:
        self.check()
        with StorageErrors("write", self.locate(name)):
            self.system.pipe_file(self.get_path(name), content)
        return False

    def read_private(self, name: str) -> PrivateFile | None:
        with StorageErrors("read", self.locate(name)):
            version = self.puts.read(self.get_path(name))
        return None if version is None else PrivateFile(version.content, version.modified_at, is_trusted=False)
