"""Lock an output folder for one process, and detect when another folder has replaced it."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from batch_infer.errors import BatchInferError, LockedError, SettingsError, StorageError
from batch_infer.records import utc_now
from batch_infer.store.files import (
    TEMPORARY_PREFIX,
    atomic_write,
    fsync_folder,
    list_names,
    path_exists,
    read_errors,
    read_status,
    unique_name,
    write_errors,
)

LOCK_SECONDS = 0.2
"""Seconds to wait for a locked folder, because `find_holder` holds the lock for a moment."""
ATTEMPTS = 10
"""Maximum number of attempts to lock a folder that another process may remove (see `_remove_unused`)."""
LOCK, HOLDER = ".lock", ".holder"
USAGE_ERRORS = {
    *(errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT),
    *(errno.ENOTDIR, errno.EPERM, errno.EROFS),
}
"""Errors that persist until the user changes the path or permissions. Others, such as a full disk, may be temporary."""


# Pinned folders


def marker_name() -> str:
    """Return the name of the empty file by which this process recognises a folder. The name is a temporary name."""
    return unique_name(TEMPORARY_PREFIX, "here")


@dataclass(frozen=True, slots=True)
class PinnedFolder:
    """A folder, and its identity before the first write. Other processes on this machine can check it too.

    `identity` is the device and inode, or None if there was no folder. `marker` is the name of a file by which the
    folder is recognised on mounts whose inode numbers change, or None.
    """

    path: Path
    identity: tuple[int, int] | None
    marker: str | None = None

    @classmethod
    def pin(cls, path: Path | PinnedFolder) -> PinnedFolder:
        """Pin a folder that is not pinned yet, with this process's marker if its file exists. Raises StorageError."""
        if isinstance(path, PinnedFolder):
            return path
        identity, marker = _identity(path), marker_name()
        return cls(path, identity, marker if path_exists(path / marker) else None)

    def with_marker(self, marker: str | None = None) -> PinnedFolder:
        """Write a marker, by default this process's, and return the folder with it. Raises StorageError."""
        name = marker or marker_name()
        with write_errors(self.path / name):
            (self.path / name).touch()
        return replace(self, marker=name)

    def remove_markers(self, subfolders: Iterable[str]) -> None:
        """Remove the marker from the folder and its subfolders. If that fails, the next sweep removes it."""
        if self.marker is not None:
            for folder in (self.path, *(self.path / name for name in subfolders)):
                with suppress(OSError):
                    (folder / self.marker).unlink(missing_ok=True)

    def check(self) -> None:
        """Check that the path is still this folder. Raises StorageError.

        After an unmount, files would be written beneath the mount point and hidden by the next mount. FUSE mounts may
        return different inode numbers on each call, so an unexpected inode alone proves nothing. In that case, the
        marker decides, at the cost of one more call.
        """
        identity = _identity(self.path)
        if identity is not None and identity == self.identity:
            return
        if identity is None or self.marker is None or not path_exists(self.path / self.marker):
            raise StorageError(
                f"{self.path} has disappeared since the run began: it was removed, renamed, unmounted or"
                " replaced by another folder; put it back and run again to continue"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    status = read_status(path, follow=True)
    return None if status is None else (status.st_dev, status.st_ino)


# Locks, which the operating system releases when the process that holds them dies


@contextmanager
def locked_folder(folder: Path, subfolders: Sequence[str] = ()) -> Iterator[PinnedFolder]:
    """Lock a folder, creating it if missing, and yield it with a marker by which writers recognise it.

    On exit, the marker is removed from the folder and from `subfolders`, and folders that this call created are removed
    if nothing was written to them, as after a usage error. In the context, an OSError for a path in the folder becomes
    StorageError. Raises LockedError, SettingsError, StorageError.
    """
    lock, created = _acquire(folder)
    pinned = PinnedFolder.pin(folder)
    try:
        with ExitStack() as stack, _storage_errors(folder):
            # While the folder is open, no folder created after its removal can get the same inode.
            with suppress(OSError):  # Windows cannot open a folder, nor remove one that contains an open file
                stack.callback(os.close, os.open(folder, os.O_RDONLY))
            with atomic_write(folder / HOLDER, flush=False, parents=False) as temporary:
                started = f"{utc_now():%Y-%m-%d %H:%M:%S} UTC"
                temporary.write_text(f"{platform.node()}, process {os.getpid()}, since {started}")
            pinned = pinned.with_marker()
            yield pinned
    finally:
        pinned.remove_markers(subfolders)
        with suppress(OSError, StorageError):  # these would mask the original exception
            if PinnedFolder.pin(folder).identity == pinned.identity:  # a replacement folder may have another holder
                (folder / HOLDER).unlink(missing_ok=True)
                _remove_unused(created)
        lock.release()


def find_holder(folder: Path) -> str | None:
    """Return a description of the process that holds the lock, or None. Raises StorageError if that is unknown."""
    path = folder / LOCK
    if not path_exists(path):
        return None
    with read_errors(path):
        return _read_holder(folder) if _is_locked(path) else None


def _remove_unused(created: Sequence[Path]) -> None:
    """Remove the lock file and these nested folders, the innermost first, if there is nothing else in the first one.

    The caller holds the lock. `_acquire` of another process may have opened the lock file, or may create it again.
    """
    if created and list_names(created[0]) == [LOCK]:
        (created[0] / LOCK).unlink()
        for folder in created:
            folder.rmdir()


def _acquire(folder: Path) -> tuple[FileLock, Sequence[Path]]:
    """Lock a folder, creating it durably if missing, and return the lock and the folders that were created.

    Start again if another process removes the folder or the lock file in the meantime. On mounts whose inode numbers
    change, every attempt appears to lock a removed file, and the last one is accepted. Raises LockedError,
    SettingsError, StorageError.
    """
    attempts = 0
    while True:
        attempts += 1
        try:
            lock, created, is_current = _acquire_once(folder)
        except Timeout:
            holder = _read_holder(folder)
            message = f"{folder} is locked by another command ({holder}); run again when that has ended"
            raise LockedError(message) from None
        except OSError as error:
            # FileExistsError: `Path.mkdir` raises it if the folder exists, but disappears before its next call.
            if isinstance(error, FileExistsError | FileNotFoundError) and attempts < ATTEMPTS:
                continue
            error_class = SettingsError if error.errno in USAGE_ERRORS else StorageError
            raise error_class(f"cannot write to {folder}: {error.strerror or error}") from error
        if is_current or attempts == ATTEMPTS:
            return lock, created
        lock.release()


def _acquire_once(folder: Path) -> tuple[FileLock, Sequence[Path], bool]:
    """Create a folder and lock it. Return the lock, the created folders, and whether the locked file is still there.

    Raises Timeout, OSError, SettingsError, StorageError.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_folder(path.parent)
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        _check_lock(path)
        lock = FileLock(path)
        lock.acquire(timeout=LOCK_SECONDS, poll_interval=LOCK_SECONDS / 4)
        # While the file is open, no other file can get its inode, and a removed file does not return to its path. So if
        # it is there now, it is the file that FileLock opened. FileLock itself checks this only in recent versions.
        status = read_status(path)
        is_current = status is not None and os.path.samestat(os.fstat(descriptor), status)
    finally:
        os.close(descriptor)
    return lock, missing, is_current


def _check_lock(path: Path) -> None:
    """Check that a file can be locked.

    Raises SettingsError if the file system has no locks, StorageError if the lock service may be down temporarily, and
    FileNotFoundError. This check is needed because without flock, filelock treats any existing file as locked, and that
    lock outlives its holder.
    """
    try:
        _is_locked(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        error_class: type[BatchInferError] = SettingsError
        advice = "mount its file system with support for flock (Lustre: -o flock, NFS: -o local_lock=flock)"
        if error.errno in (errno.ENOLCK, errno.EIO):
            error_class = StorageError
            advice = "check that the lock service of its file system is running (NFS: rpc.statd)"
        message = f"{path} cannot be locked: {error.strerror}; {advice}, or give an --out on a local disk"
        raise error_class(message) from error


def _is_locked(path: Path) -> bool:
    """Return whether a process has locked a file. On POSIX, read access is sufficient. Raises OSError."""
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
def _storage_errors(folder: Path) -> Iterator[None]:
    """Re-raise an OSError for a path in the folder as StorageError."""
    try:
        yield
    except OSError as error:
        names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
        if any(Path(name).is_relative_to(folder) for name in names):
            raise StorageError(f"cannot write {names[-1]}: {error.strerror}") from error
        raise


def _read_holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text()
    except OSError:
        return "its process is unknown"
