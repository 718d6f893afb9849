"""Inspect, create and fsync paths. An error of the disk names the path."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from batch_infer.errors import StorageError

NOT_FOUND = {errno.ENOENT, errno.ENOTDIR}
_FSYNC_UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EISDIR}
"""Errors of file systems that cannot fsync a folder."""


@contextmanager
def _storage_errors(verb: str, path: Path) -> Iterator[None]:
    """Re-raise OSError as a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise StorageError(f"cannot {verb} {path}: {reason}") from error


write_errors = partial(_storage_errors, "write")
read_errors = partial(_storage_errors, "read")


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
    """Return a path's mode, or 0 if the path is missing. Raises StorageError."""
    with read_errors(path):
        try:
            return path.stat(follow_symlinks=follow).st_mode
        except OSError as error:
            if error.errno in NOT_FOUND:
                return 0
            raise


def list_names(folder: Path) -> list[str]:
    """Return the sorted names in a folder, or an empty list if the folder is missing.

    Raises StorageError if the folder cannot be listed. `Path.glob` would hide that error.
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
    """Make a file's content durable. Raises OSError."""
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
