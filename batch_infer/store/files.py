"""Inspect paths, and write files atomically: first under a name that only this process uses, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from batch_infer.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"
_TOKEN = re.compile(r"[0-9a-f]{8}-\d+-[0-9a-f]{12}-(?=.)")
CHUNK_BYTES = 1 << 20
"""Number of bytes of a file to read and hash at a time."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RANDOM_ID = secrets.token_hex(6)
"""Distinguishes two processes that write to the same folder from machines with equal host ids."""
_unfinished: set[Path] = set()
_NOT_FOUND = {errno.ENOENT, errno.ENOTDIR}
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
    """Return whether a path exists, even if it is a broken link. Raises StorageError if that is unknown."""
    return read_status(path) is not None


def is_folder(path: Path, *, follow: bool = False) -> bool:
    """Return whether a path is a folder or, with `follow`, a link to one. Raises StorageError if that is unknown."""
    status = read_status(path, follow=follow)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_link(path: Path) -> bool:
    """Return whether a path is a symbolic link. Raises StorageError if that is unknown."""
    status = read_status(path)
    return status is not None and stat.S_ISLNK(status.st_mode)


def read_status(path: Path, *, follow: bool = False) -> os.stat_result | None:
    """Return a path's status, or None if the path is missing. Raises StorageError."""
    with read_errors(path):
        try:
            return path.stat(follow_symlinks=follow)
        except OSError as error:
            if error.errno in _NOT_FOUND:
                return None
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
    """Create a folder durably if it is missing. Its parent must exist. Raises StorageError."""
    with write_errors(folder):
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder with its content, or a file, if it exists. Raises StorageError."""
    with write_errors(path):
        shutil.rmtree(path) if is_folder(path) else path.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return hash_stream(file.read)


def hash_stream(read: Callable[[int], bytes | None]) -> str:
    """Return the SHA-256, in hexadecimal digits, of all bytes that `read` returns in chunks of at most a given size."""
    hasher = hashlib.sha256()
    while chunk := read(CHUNK_BYTES):
        hasher.update(chunk)
    return hasher.hexdigest()


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


# Names that are unique to a process


@cache
def host_id() -> str:
    """Return a digest of the host name and, on Linux, of the boot id and PID namespace.

    On Linux, process ids are unique within a host id. Many containers have the same host name and PID namespace number.
    The kernel's boot id distinguishes their machines.
    """
    namespace = Path("/proc/self/ns/pid")
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    host = f"{platform.node()} {namespace.readlink() if namespace.is_symlink() else ''} {boot}"
    return hashlib.sha256(host.encode()).hexdigest()[:8]


def unique_name(prefix: str, name: str) -> str:
    """Return a variant of a file name that no other process uses."""
    return f"{prefix}{host_id()}-{os.getpid()}-{_RANDOM_ID}-{name}"


def original_name(prefix: str, name: str) -> str | None:
    """Return the file name that a process passed to `unique_name`, or None if `name` is not a unique name."""
    match = _TOKEN.match(name, len(prefix)) if name.startswith(prefix) else None
    return None if match is None else name[match.end() :]


def temporary_path(path: Path) -> Path:
    """Return the path to which this process writes a file until it is complete."""
    return path.with_name(unique_name(TEMPORARY_PREFIX, path.name))


def is_temporary(name: str) -> bool:
    """Return whether `temporary_path` made a name, in this or another process."""
    return original_name(TEMPORARY_PREFIX, name) is not None


def is_abandoned(name: str, prefix: str = TEMPORARY_PREFIX) -> bool:
    """Return whether `unique_name` made a name in a dead process of this machine, or False if that is unknown."""
    host, _, rest = name.removeprefix(prefix).partition("-")
    process_id = rest.partition("-")[0]
    if not name.startswith(prefix) or os.name != "posix" or host != host_id() or not process_id.isdecimal():
        return False
    try:
        os.kill(int(process_id), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)  # otherwise it is another user's living process
    return False


# Files


@contextmanager
def atomic_write(path: Path, *, flush: bool = True, parents: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` unless an exception is raised.

    With `flush`, a power cut leaves the old or the new file: the bytes are durable before the rename, and the rename
    is durable on return. Without `parents`, the folder must exist. Raises StorageError, also for an OSError in
    the context.
    """
    temporary = temporary_path(path)
    with write_errors(path):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        _unfinished.add(temporary)
        try:
            yield temporary
            if flush:
                fsync(temporary)
            os.replace(temporary, path)  # noqa: PTH105
        finally:
            temporary.unlink(missing_ok=True)
            _unfinished.discard(temporary)
        if flush:
            fsync_folder(path.parent)


def remove_unfinished() -> None:
    """Remove this process's unfinished files before it exits without unwinding `atomic_write`."""
    for temporary in list(_unfinished):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_case_sensitive(folder: Path) -> bool:
    """Return whether names in a folder may differ only by case. By default, NTFS, APFS, FAT and SMB do not allow it.

    Creates and removes a temporary file in the folder. Raises StorageError.
    """
    probe = temporary_path(folder / "case")
    with write_errors(probe):
        probe.touch()
        try:
            return not path_exists(probe.with_name(probe.name.upper()))
        finally:
            probe.unlink(missing_ok=True)


def scan_folder(folder: Path, is_match: Callable[[str], bool]) -> tuple[list[Path], list[Path]]:
    """Return the files and links whose name `is_match` accepts, and the subfolders that are not links.

    Files are neither opened nor statted, because there may be many. Raises OSError.
    """
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif is_match(entry.name):
                files.append(Path(entry.path))
    return files, folders
