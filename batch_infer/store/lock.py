"""Lock an output folder for one process. The operating system releases the lock when the process dies."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from batch_infer.errors import LockedError, SettingsError, StorageError
from batch_infer.records import utc_now
from batch_infer.store.atomic import atomic_write
from batch_infer.store.paths import fsync_folder, path_exists, read_errors
from batch_infer.store.pinned import PinnedFolder

LOCK_SECONDS = 0.2
"""Seconds to wait for a locked folder, since `find_holder` holds the lock for a moment."""
LOCK, HOLDER = ".lock", ".holder"
_USAGE_ERRORS = {
    *(errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT),
    *(errno.ENOTDIR, errno.EPERM, errno.EROFS),
}
"""Errors from creating a folder that another folder or permissions fix. Others, such as a full disk, may pass."""


@contextmanager
def locked_folder(folder: Path, inner: Sequence[str] = ()) -> Iterator[PinnedFolder]:
    """Lock a folder, creating it if missing, and yield it with a marker by which writers recognise it.

    On exit, the marker is removed from the folder and its subfolders `inner`. An OSError for a path in the folder
    becomes StorageError. Raises LockedError, SettingsError, StorageError.
    """
    lock = _acquire(folder)
    pinned = PinnedFolder.pin(folder)
    try:
        with _keep_open(folder), _storage_errors(folder):
            _write_holder(folder)
            pinned = pinned.with_marker()
            yield pinned
    finally:
        pinned.remove_markers(inner)
        with suppress(OSError, StorageError):  # these would mask the original exception
            if PinnedFolder.pin(folder).identity == pinned.identity:  # a replacement folder may have another holder
                (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def find_holder(folder: Path) -> str | None:
    """Return the process that holds the lock, or None. Raises StorageError if the lock cannot be read."""
    path = folder / LOCK
    if not path_exists(path):
        return None
    with read_errors(path):
        return _read_holder(folder) if _is_locked(path) else None


def remove_stale_holder(folder: Path) -> None:
    """Remove the holder file of a killed process. The current holder, even this process, keeps its file."""
    if path_exists(folder / HOLDER):
        with suppress(Timeout), FileLock(folder / LOCK).acquire(timeout=0):
            (folder / HOLDER).unlink(missing_ok=True)


def _acquire(folder: Path) -> FileLock:
    try:
        _create(folder)
        _check_lock(folder / LOCK)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=LOCK_SECONDS, poll_interval=LOCK_SECONDS / 4)
    except Timeout:
        holder = _read_holder(folder)
        raise LockedError(f"{folder} is held by another run ({holder}); run again when it has ended") from None
    except OSError as error:
        error_class = SettingsError if error.errno in _USAGE_ERRORS else StorageError
        raise error_class(f"cannot write to {folder}: {error.strerror or error}") from error
    return lock


def _create(folder: Path) -> None:
    """Create a folder and missing parents, and fsync their names. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_folder(path.parent)


def _check_lock(path: Path) -> None:
    """Check that a lock file can be locked.

    Raises SettingsError if the file system has no locks, StorageError if the error may be temporary, else OSError.
    Without flock, filelock treats any existing file as locked, and that lock outlives its holder.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666))
    try:
        _is_locked(path)
    except OSError as error:
        fault = f"{path} cannot be locked: {error.strerror}"
        if error.errno in (errno.ENOLCK, errno.EIO):
            raise StorageError(
                f"{fault}; see that the lock service of its file system runs (NFS: rpc.statd), or give an --out on a"
                " local disk"
            ) from error
        raise SettingsError(
            f"{fault}; mount its file system with support for flock (Lustre: -o flock, NFS: -o local_lock=flock), or"
            " give an --out on a local disk"
        ) from error


def _is_locked(path: Path) -> bool:
    """Return whether a process holds a lock file. It only needs to be readable. Raises OSError."""
    try:
        import fcntl
    except ImportError:  # Windows
        try:
            with FileLock(path).acquire(timeout=LOCK_SECONDS):
                return False
        except Timeout:
            return True
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that readers do not block each other
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            return True
        raise
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _keep_open(folder: Path) -> Iterator[None]:
    """Keep a folder open, so that no folder created after its removal can get the same inode."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder, nor remove one that contains an open file
        yield
        return
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Re-raise an OSError for a path in the folder as StorageError."""
    try:
        yield
    except OSError as error:
        names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
        if any(Path(name).is_relative_to(folder) for name in names):
            raise StorageError(f"cannot write {names[-1]}: {error.strerror}") from error
        raise


def _write_holder(folder: Path) -> None:
    with atomic_write(folder / HOLDER, flush=False, parents=False) as temporary:
        temporary.write_text(f"{platform.node()}, process {os.getpid()}, since {utc_now():%Y-%m-%d %H:%M:%S} UTC")


def _read_holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text()
    except OSError:
        return "its process is unknown"
