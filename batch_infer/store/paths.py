"""Inspect, create and fsync paths. Disk errors name the path."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batch_infer.errors import StorageError

NOT_FOUND = {errno.ENOENT, errno.ENOTDIR}
_FSYNC_UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EISDIR}
"""Errors of file systems that cannot fsync a folder."""


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Re-raise OSError as a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {_reason(error)}") from error


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Re-raise OSError as a StorageError that names `path`, which may exist although it is unreadable."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot read {path}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def path_exists(path: Path) -> bool:
    """Return whether a path exists, even as a broken link. Raises StorageError if that is unknown."""
    return _mode(path) != 0


def is_folder(path: Path, *, follow: bool = False) -> bool:
    """Return whether a path is a folder or, with `follow`, a link to one. Raises StorageError if that is unknown."""
    return stat.S_ISDIR(_mode(path, follow=follow))


def is_link(path: Path) -> bool:
    """Return whether a path is a symbolic link. Raises StorageError if that is unknown."""
    return stat.S_ISLNK(_mode(path))


def _mode(path: Path, *, follow: bool = False) -> int:
    """Return a path's mode, or 0 if it is missing. Raises StorageError."""
    with read_errors(path):
        try:
            return path.stat(follow_symlinks=follow).st_mode
        except OSError as error:
            if error.errno in NOT_FOUND:
                return 0
            raise


def list_names(folder: Path) -> list[str]:
    """Return the sorted names in a folder, or none if it is missing. Raises StorageError if it cannot be listed.

    `Path.glob` would hide that error.
    """
    with read_errors(folder):
        try:
            return sorted(os.listdir(folder))  # noqa: PTH208
        except FileNotFoundError:
            return []


def make_folder(folder: Path) -> None:
    """Create a folder durably in an existing folder. Raises StorageError."""
    with write_errors(folder):
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def fsync(path: Path) -> None:
    """Make the content of a file durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable if its file system supports that. Raises OSError."""
    try:
        fsync(folder)
    except OSError as error:
        if error.errno not in _FSYNC_UNSUPPORTED:
            raise
