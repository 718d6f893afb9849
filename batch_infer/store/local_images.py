"""Store images in a local folder, so that each appears whole and is durable before its manifest part."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path, PurePosixPath

from batch_infer.errors import StorageError
from batch_infer.store.files import (
    TEMPORARY_PREFIX,
    fsync,
    fsync_folder,
    is_case_sensitive,
    is_link,
    make_folder,
    path_exists,
    read_errors,
    temporary_path,
    write_errors,
)
from batch_infer.store.folder import PinnedFolder
from batch_infer.store.listing import hash_files, list_tree
from batch_infer.store.protocol import IMAGE_FOLDERS, FileDigest, StoreAddress, is_inside

FSYNC_THREADS = 32
"""Maximum number of images to fsync concurrently.

A file system's journal commits all waiting fsyncs together, which is several times as fast as one at a time. The gain
is larger on a slow disk. Linux's `syncfs` is even faster, but it also waits for writes of other programs, does not
reach the server behind a FUSE mount, and hides some errors.
"""
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_READ_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
"""With O_NONBLOCK, opening does not block if another program has replaced the image with a pipe."""


class LocalImages:
    """The half of LocalStore that checks the folder, creates folders in it, and stores images.

    Before each write, checks that no other folder has replaced OUT, or images/ or quarantine/ if they are links or
    mounts.
    """

    def __init__(self, folder: Path | PinnedFolder | StoreAddress) -> None:
        """Open a folder, which may be missing. Raises StorageError if it cannot be read."""
        if isinstance(folder, StoreAddress):
            folder = PinnedFolder(Path(folder.location), folder.identity, folder.marker)
        pinned = PinnedFolder.pin(folder)
        self.root = pinned.path
        self._pinned = {self.root: pinned}
        self._created_folders = {self.root}
        self._folder_lock = threading.RLock()

    @property
    def location(self) -> str:
        return str(self.root)

    @property
    def address(self) -> StoreAddress:
        pinned = self._pinned[self.root]
        return StoreAddress(str(self.root), pinned.identity, pinned.marker)

    def check(self) -> None:
        for pinned in list(self._pinned.values()):
            pinned.check()

    def is_case_sensitive(self, folder: str) -> bool:
        """Return whether a folder is case-sensitive. Its disk may differ from OUT's."""
        self.check()
        path = self.root / folder
        return is_case_sensitive(path if path_exists(path) else self.root)

    def has_image(self, name: str) -> bool:
        return self._find(name) is not None

    def list_images(self, folder: str) -> set[str]:
        path = self._resolve(f"{folder}/_")
        if path is None:
            return set()
        with read_errors(path.parent):
            try:
                with os.scandir(path.parent) as entries:
                    return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
            except OSError as error:
                if error.errno in _MISSING:
                    return set()
                raise

    def read_image(self, name: str, length: int | None = None) -> bytes | None:
        target = self._find(name)
        if target is None:
            return None
        with read_errors(target), suppress(FileNotFoundError), os.fdopen(os.open(target, _READ_FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and length in (None, status.st_size):
                return file.read()
        return None

    def list_image_files(self, *, needs_sizes: bool = True) -> Iterator[tuple[str, int | None]]:
        root = str(self.root)
        return chain.from_iterable(list_tree(root, folder, needs_sizes=needs_sizes) for folder in IMAGE_FOLDERS)

    def hash_images(self, images: Sequence[tuple[str, int]]) -> list[FileDigest | None]:
        return hash_files(str(self.root), images)

    def stage(self, name: str, content: bytes) -> None:
        target = self.root / name
        self.check()
        self._make_folder(target.parent)
        temporary = temporary_path(target)
        with write_errors(target):
            try:
                temporary.write_bytes(content)
            except OSError:  # free the space if the disk is full
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise

    def publish(self, names: Sequence[str]) -> None:
        """Fsync all images, then rename them. After a power cut, no name has an incomplete image."""
        targets = [self.root / name for name in names]
        with ThreadPoolExecutor(FSYNC_THREADS) as pool:
            futures = [(target, pool.submit(fsync, temporary_path(target))) for target in targets]
            for target, future in futures:
                with write_errors(target):
                    future.result()
        for target in targets:
            with write_errors(target):
                os.replace(temporary_path(target), target)  # noqa: PTH105
        _fsync_parents(targets)

    def read_staged(self, name: str) -> bytes:
        path = temporary_path(self.root / name)
        with read_errors(path):
            return path.read_bytes()

    def discard_staged(self, names: Iterable[str]) -> None:
        for name in names:
            path = temporary_path(self.root / name)
            with write_errors(path):
                path.unlink(missing_ok=True)

    def back_up(self, backups: Mapping[str, str]) -> None:
        """Rename images to their backups."""
        moved = []
        for name, backup in backups.items():
            target, backup_path = self.root / name, self.root / backup
            with write_errors(target), suppress(FileNotFoundError):
                if not path_exists(backup_path):
                    os.replace(target, backup_path)  # noqa: PTH105
                    moved.append(target)
        _fsync_parents(moved)

    def remove_empty_folder(self, name: str) -> None:
        """Remove a folder if it is empty and not a link."""
        path = self.root / name
        if not is_link(path):
            with suppress(OSError):  # not empty
                path.rmdir()

    def _resolve(self, name: str) -> Path | None:
        """Return the path of a file, or None if it leads out of OUT, or is an image whose path leads through a link.

        Names of images come from manifest parts, which anyone may have edited. Image folders may be links to a larger
        disk, but paths through links inside them are refused.
        """
        if not is_inside(name):
            return None
        top, *inner = PurePosixPath(name).parts
        folder = self.root / top
        for part in inner[:-1] if top in IMAGE_FOLDERS else ():
            folder /= part
            if os.path.islink(folder):  # noqa: PTH114
                return None
        return self.root / name

    def _find(self, name: str) -> Path | None:
        """Return the path of an image, or None if it is missing or not a regular file."""
        target = self._resolve(name)
        if target is None:
            return None
        with read_errors(target):
            try:
                return target if stat.S_ISREG(target.lstat().st_mode) else None
            except OSError as error:
                if error.errno in _MISSING:
                    return None
                raise

    def _make_folder(self, folder: Path) -> None:
        """Create a folder below OUT, with its parents, once."""
        if folder in self._created_folders:
            return
        with self._folder_lock:
            self._make_folder(folder.parent)
            make_folder(folder)
            top = folder.relative_to(self.root).parts[0]
            if top in IMAGE_FOLDERS:
                if folder.parent != self.root and is_link(folder):
                    raise StorageError(
                        f"{folder} is a link; only images/ and quarantine/ may be: put the folder itself there"
                    )
                if folder.parent == self.root:
                    self._pin(folder)
            elif is_link(folder):
                raise StorageError(f"{folder} is a link; only images/ and quarantine/ may be: replace it with a folder")
            self._created_folders.add(folder)

    def _forget_folders(self) -> None:
        """Create folders again when they are needed, because some were removed."""
        with self._folder_lock:
            self._created_folders = {self.root}

    def _pin(self, folder: Path) -> None:
        """Make `check` check images/ or quarantine/ too.

        If OUT has a temporary marker, only links and mounts need this, and the marker is also written to them.
        """
        marker = self._pinned[self.root].marker
        if marker is None or not marker.startswith(TEMPORARY_PREFIX):
            self._pinned.setdefault(folder, PinnedFolder.pin(folder))
        elif is_link(folder) or folder.is_mount():  # otherwise the folder disappears with OUT
            self._pinned.setdefault(folder, PinnedFolder.pin(folder).with_marker(marker))


def _fsync_parents(targets: Iterable[Path]) -> None:
    for folder in dict.fromkeys(target.parent for target in targets):
        with write_errors(folder):
            fsync_folder(folder)
