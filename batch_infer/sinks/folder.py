"""Images as files under OUT, each whole or not there at all."""

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
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import TypeVar

from batch_infer.errors import StorageError
from batch_infer.records import PromptRequest, StoredImage
from batch_infer.store import (
    TEMPORARY_PREFIX,
    PinnedFolder,
    fsync,
    fsync_folder,
    is_case_sensitive,
    is_link,
    make_folder,
    original_name,
    path_exists,
    read_errors,
    temporary_path,
    unique_name,
    write_errors,
)

ROWS_PER_FOLDER = 1000
BACKUP_PREFIX = ".original-"
SYNC_THREADS = 32
"""Images that wait for the disk at once.

A journal takes all that wait in one go, so this is several times as fast as one after the other, and more so on a disk
that is slow to answer. (Linux's `syncfs` is faster yet, but also waits for what other programs have written, does not
reach the server behind a FUSE mount, and keeps some errors to itself.)
"""
AnyPath = TypeVar("AnyPath", Path, PurePosixPath)
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
"""A pipe, which somebody may have put there, is not waited for."""
_PLAIN = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]{0,78}[a-z0-9_-])?")
_PLAIN_WITH_CAPITALS = re.compile(_PLAIN.pattern, re.IGNORECASE | re.ASCII)
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


class FolderSink:
    """`images/STEM-NNNNN/ID-K.png` under OUT, flagged images that are set apart under `quarantine/`.

    OUT is the folder that bore this name when the sink was made: once it has gone, nothing is written any more. Nor
    once images/ or quarantine/ has, which may be links to a larger disk.

    Ids keep their dots. A webdataset key would end at the first of them, so a sink of tar shards must replace dots.
    """

    def __init__(self, out: Path | PinnedFolder, suffix: str = "") -> None:
        known = PinnedFolder.of(out)
        self._out, self._suffix = known.path, suffix
        self._known = {known.path: known}
        self._made = {known.path}
        self._case: dict[str, bool] = {}
        self._case_lock = threading.Lock()

    def path_of(self, request: PromptRequest, *, quarantine: bool = False) -> str:
        """Return where to store a request's image, relative to OUT.

        An image that is rendered again keeps its name. No two paths of an OUT differ by case alone, so that it can
        be copied to any file system; only files that an Azure ML job reads on different workers are an exception.
        Raises StorageError.
        """
        top = "quarantine" if quarantine else "images"
        folder = self._name(top, request.source.stem, collides=request.stem_collides)
        path = self._path(request, top, folder, self._name(top, request.id, collides=request.id_collides))
        kept = f"{top}/{(request.replaces or '').partition('/')[2]}"
        possible = self._possible_paths(request, top, lambda text: {name_with_digest(text)})
        return kept if request.replaces and kept in possible else path

    def possible_paths(self, request: PromptRequest) -> set[str]:
        """Return all paths that this and earlier versions may give a request's image, and no other's.

        Raises StorageError.
        """
        return self._possible_paths(request, "images") | self._possible_paths(request, "quarantine")

    def _possible_paths(
        self, request: PromptRequest, top: str, digests: Callable[[str], set[str]] | None = None
    ) -> set[str]:
        stem, name, digests = request.source.stem, request.id, digests or _names_with_digest
        return {
            self._path(request, top, folder, file)
            for folder in {self._name(top, stem, collides=request.stem_collides), *digests(stem)}
            for file in {self._name(top, name, collides=request.id_collides), *digests(name)}
        }

    def _path(self, request: PromptRequest, top: str, folder: str, name: str) -> str:
        number = request.source.row // ROWS_PER_FOLDER
        return f"{top}/{folder}-{number:05d}/{name}-{request.image_index}{self._suffix}"

    def _name(self, top: str, text: str, *, collides: bool) -> str:
        """Return a text's part of a path; capitals are kept where the file system tells them from small letters."""
        if collides:
            return name_with_digest(text)
        names = plain_name(text), plain_name(text, capitals=True)
        return names[names[0] != names[1] and self._distinguishes_case(top)]

    def _distinguishes_case(self, top: str) -> bool:
        """Return `distinguishes_case` of images/ or quarantine/, which may be on another disk than OUT."""
        with self._case_lock:
            if top not in self._case:
                self._check()
                folder = self._out / top
                self._case[top] = is_case_sensitive(folder if path_exists(folder) else self._out)
            return self._case[top]

    def write(self, path: str, content: bytes) -> StoredImage:
        """Store a file under a temporary name, until `settle` gives it its own. Raises StorageError."""
        target = self._out / path
        self._check()
        self._make(target.parent)
        temporary = temporary_path(target)
        with write_errors(target):
            try:
                temporary.write_bytes(content)
            except OSError:  # a full disk must not be left fuller
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        return StoredImage(path, hashlib.sha256(content).hexdigest(), len(content))

    def publish(self, paths: Iterable[str]) -> None:
        """Have the disk hold these files and give them their names, just before a manifest part speaks of them.

        Not when they are written: a run that ends in between has then replaced no image that the manifest stands by.
        A power cut takes at most what was not settled, and an image whose place it takes is replaced by a whole one.
        When this returns, the disk holds the names too. Raises StorageError.
        """
        targets = [self._out / path for path in paths]
        self._check()
        with ThreadPoolExecutor(SYNC_THREADS) as pool:
            under_way = [(target, pool.submit(fsync, temporary_path(target))) for target in targets]
            for target, held in under_way:
                with write_errors(target):
                    held.result()
        for target in targets:
            with write_errors(target):
                os.replace(temporary_path(target), target)  # noqa: PTH105
        for folder in dict.fromkeys(target.parent for target in targets):
            with write_errors(folder):
                fsync_folder(folder)

    def back_up(self, paths: Iterable[str]) -> None:
        """Rename images to hidden names in the same folder, before `settle` gives their names to others.

        A process that is killed before the manifest has the new images loses none: `bring_back` undoes this. A file
        that this process set aside before stays: what took its name then was never committed. Missing images are
        skipped. Raises StorageError.
        """
        self._check()
        targets = [target for path in paths if not path_exists(_aside(target := self._out / path))]
        for target in targets:
            with write_errors(target), suppress(FileNotFoundError):
                os.replace(target, _aside(target))  # noqa: PTH105
        for folder in dict.fromkeys(target.parent for target in targets):
            with write_errors(folder):
                fsync_folder(folder)

    def restore(self, aside: str) -> None:
        """Give a file that a process has set aside its former name again. Raises StorageError."""
        self._check()
        target = self._out / (original_path(aside) or aside)
        with write_errors(target):
            os.replace(self._out / aside, target)  # noqa: PTH105
            fsync_folder(target.parent)

    def remove(self, path: str) -> None:
        """Remove an image by its path relative to OUT; a path that leads out of it is none of ours.

        Raises StorageError.
        """
        self._check()
        target = resolve_path(self._out, path)
        if target is not None:
            with write_errors(target):
                target.unlink(missing_ok=True)

    def _check(self) -> None:
        for known in list(self._known.values()):
            known.check()

    def _make(self, folder: Path) -> None:
        """Have a folder below OUT, asking the disk the first time only."""
        if folder in self._made:
            return
        self._make(folder.parent)
        make_folder(folder)
        if folder.parent.parent == self._out and is_link(folder):
            raise StorageError(f"{folder} is a link; only images/ and quarantine/ may be: put the folder itself there")
        if folder.parent == self._out:
            self._know(folder)
        self._made.add(folder)

    def _know(self, folder: Path) -> None:
        """Watch images/ or quarantine/ as OUT is watched: with a marker where it is on another disk."""
        marker = self._known[self._out].marker
        if marker is None or not marker.startswith(TEMPORARY_PREFIX):
            self._known.setdefault(folder, PinnedFolder.of(folder))
        elif is_link(folder) or folder.is_mount():  # else it disappears with OUT
            self._known.setdefault(folder, PinnedFolder.of(folder).with_marker(marker))


def resolve_path(out: Path, path: str) -> Path | None:
    """Return where an image of this path is, or None for a path that leaves images/ and quarantine/.

    Paths come from manifest parts, and a part is a file like any other. images/ itself may be a link to a larger disk;
    a link within it is not followed.
    """
    relative = PurePosixPath(path)
    top, *inner = relative.parts or ("",)
    if "\0" in path or ".." in inner or not inner or top not in ("images", "quarantine"):
        return None
    folders = accumulate(inner[:-1], Path.joinpath, initial=out / top)
    next(folders)
    return None if any(map(os.path.islink, folders)) else out / relative


def has_image(out: Path, path: str) -> bool:
    """Return whether an image of this path is a file. Raises StorageError where that cannot be found out."""
    target = resolve_path(out, path)
    if target is None:
        return False
    with read_errors(target):
        try:
            return stat.S_ISREG(target.lstat().st_mode)
        except OSError as error:
            if error.errno in _NO_FILE:
                return False
            raise


def read_image(out: Path, path: str, length: int | None = None) -> bytes | None:
    """Return the content of an image, or None where there is no such file, or with `length` none of that length.

    Links are not followed, and nothing but a file is opened. Raises StorageError where it is there and cannot be read.
    """
    target = resolve_path(out, path)
    if target is None:
        return None
    with read_errors(target):
        try:
            descriptor = os.open(target, _READ)
        except OSError as error:
            if error.errno in _NO_FILE:
                return None
            raise
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or length not in (None, found.st_size):
                return None
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)


def backup_path(path: str) -> str:
    """Return the path that `set_aside` gives a file in this process, relative to OUT like its own."""
    return _aside(PurePosixPath(path)).as_posix()


def original_path(path: str) -> str | None:
    """Return the path that a file had before `set_aside`, in any process, or None where it was not set aside."""
    aside = PurePosixPath(path)
    name = original_name(BACKUP_PREFIX, aside.name)
    return None if name is None else aside.with_name(name).as_posix()


def _aside(path: AnyPath) -> AnyPath:
    return path.with_name(unique_name(BACKUP_PREFIX, path.name))


def plain_name(text: str, *, capitals: bool = False) -> str:
    """Return a file name for any text, on any file system, such that no two texts share one.

    Lower-case letters, digits, `_`, `.` and `-` stay as they are, and with `capitals` capital letters do, for file
    systems that tell them apart. A text with any other character has `name_with_digest`, as have Windows's devices.
    """
    pattern = _PLAIN_WITH_CAPITALS if capitals else _PLAIN
    return text if pattern.fullmatch(text) and not _DEVICE.fullmatch(text) else name_with_digest(text)


def possible_names(text: str) -> set[str]:
    """Return all names that a text may have in a path, on any file system."""
    return {plain_name(text), plain_name(text, capitals=True), name_with_digest(text)}


def name_with_digest(text: str) -> str:
    """Return a text's readable characters, `~` and a digest of the whole: no other text has it, whatever its case."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60]
    return f"{readable}~{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _names_with_digest(text: str) -> set[str]:
    """Return the name that earlier versions gave a text, where it has a digest."""
    return {plain_name(text)} - {text}
