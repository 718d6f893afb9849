"""Store images as files in OUT, atomically."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath

from batch_infer.errors import StorageError
from batch_infer.records import PromptRequest, Source, StoredImage
from batch_infer.sinks.names import Collisions, ImageIndex, hashed_name, safe_name
from batch_infer.store import (
    TEMPORARY_PREFIX,
    PinnedFolder,
    fsync,
    fsync_folder,
    is_case_sensitive,
    is_link,
    list_names,
    make_folder,
    original_name,
    path_exists,
    read_errors,
    temporary_path,
    unique_name,
    write_errors,
)

IMAGE_FOLDERS = ("images", "quarantine")
ROWS_PER_FOLDER = 1000
BACKUP_PREFIX = ".original-"
FSYNC_THREADS = 32
"""Maximum number of images to fsync concurrently.

A file system's journal commits all waiting fsyncs together, which is several times as fast as one at a time. The gain
is larger on a slow disk. Linux's `syncfs` is even faster, but it also waits for writes of other programs, does not
reach the server behind a FUSE mount, and hides some errors.
"""
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_READ_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
"""With O_NONBLOCK, opening does not block if another program has replaced the image with a pipe."""


class FolderSink:
    """Stores images in OUT as images/STEM-NNNNN/ID-K.png, or as quarantine/STEM-NNNNN/ID-K.png if requested.

    Before each write, checks that no other folder has replaced OUT, or images/ or quarantine/ if they are links or
    mounts, for example to use a larger disk. Ids keep their dots, although a webdataset key would end at the first dot.
    """

    def __init__(self, out: Path | PinnedFolder, suffix: str = "") -> None:
        pinned = PinnedFolder.pin(out)
        self._out, self._suffix = pinned.path, suffix
        self._pinned = {pinned.path: pinned}
        self._created_folders = {pinned.path}
        self._case_sensitive: dict[str, bool] = {}
        self._case_lock = threading.Lock()

    def path_of(self, request: PromptRequest, *, quarantine: bool = False) -> str:
        """Return a path that no other image has, even if case is ignored, so that OUT can be copied to any file system.

        Only paths of tables that different workers of an Azure ML job read may differ by case alone.
        """
        paths = self._list_paths(request, IMAGE_FOLDERS[quarantine], lambda text: {hashed_name(text)})
        previous_path = self.path_in(request.replaces or "", quarantine=quarantine)
        return previous_path if previous_path in paths else paths[0]

    def possible_paths(self, request: PromptRequest) -> set[str]:
        def hash_unsafe(text: str) -> set[str]:  # earlier versions hashed only unsafe names
            return {safe_name(text)} - {text}

        return {path for top in IMAGE_FOLDERS for path in self._list_paths(request, top, hash_unsafe)}

    def path_in(self, path: str, *, quarantine: bool) -> str:
        return f"{IMAGE_FOLDERS[quarantine]}/{path.partition('/')[2]}"

    def folders_of(self, files: Iterable[str]) -> list[Path]:
        stems = {Source(file, 0).stem for file in files}
        spellings = ({safe_name(stem), safe_name(stem, capitals=True), hashed_name(stem)} for stem in stems)
        names = set[str]().union(*spellings)
        tops = [self._out / top for top in IMAGE_FOLDERS]
        folders = [top / name for top in tops for name in list_names(top) if re.sub(r"-[0-9]+$", "", name) in names]
        return [*tops, *folders]

    def collisions(self, index: ImageIndex) -> Collisions:
        return Collisions(index)

    def _list_paths(self, request: PromptRequest, top: str, other_names: Callable[[str], set[str]]) -> list[str]:
        """Return the path for a new image, then the paths under other names of its folder and its id."""
        stem, name = request.source.stem, request.id
        folders = [self._name(top, stem, collides=request.stem_collides), *other_names(stem)]
        files = [self._name(top, name, collides=request.id_collides), *other_names(name)]
        return [self._path(request, top, folder, file) for folder in folders for file in files]

    def _path(self, request: PromptRequest, top: str, folder: str, name: str) -> str:
        """Return an image's path in the folder `top` of OUT.

        `folder` and `name` are safe path components for the request's file and id. If case is ignored, `name`
        may be unique only within `folder`.
        """
        number = request.source.row // ROWS_PER_FOLDER
        return f"{top}/{folder}-{number:05d}/{name}-{request.image_index}{self._suffix}"

    def _name(self, top: str, text: str, *, collides: bool) -> str:
        """Return a path component for a text: hashed if it collides, else with capitals if `top` is case-sensitive."""
        if collides:
            return hashed_name(text)
        lower, mixed = safe_name(text), safe_name(text, capitals=True)
        return mixed if lower != mixed and self._is_case_sensitive(top) else lower

    def _is_case_sensitive(self, top: str) -> bool:
        """Return whether images/ or quarantine/ is case-sensitive. The folder's disk may differ from OUT's."""
        with self._case_lock:
            if top not in self._case_sensitive:
                self._check()
                folder = self._out / top
                self._case_sensitive[top] = is_case_sensitive(folder if path_exists(folder) else self._out)
            return self._case_sensitive[top]

    def write(self, path: str, content: bytes) -> StoredImage:
        target = self._out / path
        self._check()
        self._make_folder(target.parent)
        temporary = temporary_path(target)
        with write_errors(target):
            try:
                temporary.write_bytes(content)
            except OSError:  # free the space if the disk is full
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        return StoredImage(path, hashlib.sha256(content).hexdigest(), len(content))

    def publish(self, paths: Iterable[str]) -> None:
        """Fsync all images, then rename them. After a power cut, no path has an incomplete image."""
        targets = [self._out / path for path in paths]
        self._check()
        with ThreadPoolExecutor(FSYNC_THREADS) as pool:
            futures = [(target, pool.submit(fsync, temporary_path(target))) for target in targets]
            for target, future in futures:
                with write_errors(target):
                    future.result()
        for target in targets:
            with write_errors(target):
                os.replace(temporary_path(target), target)  # noqa: PTH105
        _fsync_parents(targets)

    def back_up(self, paths: Iterable[str]) -> None:
        """Rename images to hidden names.

        An image that this process has already backed up is skipped: the file at its path was never committed.
        """
        self._check()
        backups = {self._out / path: self._out / self.backup_path(path) for path in paths}
        moved = []
        for target, backup in backups.items():
            with write_errors(target), suppress(FileNotFoundError):
                if not path_exists(backup):
                    os.replace(target, backup)  # noqa: PTH105
                    moved.append(target)
        _fsync_parents(moved)

    def backup_path(self, path: str) -> str:
        image = PurePosixPath(path)
        return image.with_name(unique_name(BACKUP_PREFIX, image.name)).as_posix()

    def restore(self, backup: str) -> None:
        self._check()
        target = self._out / (original_path(backup) or backup)
        with write_errors(target):
            os.replace(self._out / backup, target)  # noqa: PTH105
            fsync_folder(target.parent)

    def remove(self, path: str) -> None:
        self._check()
        target = resolve_path(self._out, path)
        if target is not None:
            with write_errors(target):
                target.unlink(missing_ok=True)

    def has(self, path: str) -> bool:
        return self._find(path) is not None

    def read(self, path: str, length: int | None = None) -> bytes | None:
        target = self._find(path)
        if target is None:
            return None
        with read_errors(target), suppress(FileNotFoundError), os.fdopen(os.open(target, _READ_FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and length in (None, status.st_size):
                return file.read()
        return None

    def _find(self, path: str) -> Path | None:
        """Return the file of an image, or None if the path is missing or not a regular file."""
        target = resolve_path(self._out, path)
        if target is None:
            return None
        with read_errors(target):
            try:
                return target if stat.S_ISREG(target.lstat().st_mode) else None
            except OSError as error:
                if error.errno in _MISSING:
                    return None
                raise

    def _check(self) -> None:
        for pinned in list(self._pinned.values()):
            pinned.check()

    def _make_folder(self, folder: Path) -> None:
        """Create a folder below OUT, with its parents, once per sink."""
        if folder in self._created_folders:
            return
        self._make_folder(folder.parent)
        make_folder(folder)
        if folder.parent.parent == self._out and is_link(folder):
            raise StorageError(f"{folder} is a link; only images/ and quarantine/ may be: put the folder itself there")
        if folder.parent == self._out:
            self._pin(folder)
        self._created_folders.add(folder)

    def _pin(self, folder: Path) -> None:
        """Make `_check` check images/ or quarantine/ too.

        If OUT has a temporary marker, only links and mounts need this, and the marker is also written to them.
        """
        marker = self._pinned[self._out].marker
        if marker is None or not marker.startswith(TEMPORARY_PREFIX):
            self._pinned.setdefault(folder, PinnedFolder.pin(folder))
        elif is_link(folder) or folder.is_mount():  # otherwise the folder disappears with OUT
            self._pinned.setdefault(folder, PinnedFolder.pin(folder).with_marker(marker))


def resolve_path(out: Path, path: str) -> Path | None:
    """Return the full path of an image, or None if the path may lead out of images/ and quarantine/.

    Paths come from manifest parts, which anyone may have edited. images/ and quarantine/ may be links to a larger
    disk, but paths through links inside them are refused.
    """
    relative = PurePosixPath(path)
    top, *inner = relative.parts or ("",)
    if "\0" in path or ".." in inner or not inner or top not in IMAGE_FOLDERS:
        return None
    folder = out / top
    for name in inner[:-1]:
        folder /= name
        if os.path.islink(folder):  # noqa: PTH114
            return None
    return out / relative


def original_path(path: str) -> str | None:
    """Return the path that a file had before a process backed it up, or None if the file is not a backup."""
    backup = PurePosixPath(path)
    name = original_name(BACKUP_PREFIX, backup.name)
    return None if name is None else backup.with_name(name).as_posix()


def _fsync_parents(targets: Iterable[Path]) -> None:
    for folder in dict.fromkeys(target.parent for target in targets):
        with write_errors(folder):
            fsync_folder(folder)
