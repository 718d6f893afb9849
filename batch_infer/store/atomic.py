"""Files that appear whole or not at all: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from batch_infer.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"
_TOKEN = re.compile(r"[0-9a-f]{8}-\d+-[0-9a-f]{12}-(?=.)")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR}
_NO_SUCH_CALL = {errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EISDIR}
"""What file systems say that do not let a folder be handed to the disk."""

_token = ""


def _draw_token() -> None:
    """Numbers of processes meet where several machines write into one folder; a token that is drawn does not."""
    global _token
    _token = f"{host_id()}-{os.getpid()}-{secrets.token_hex(6)}"


def host_id() -> str:
    """Return a digest of where process numbers are unique: host name, and on Linux boot and PID namespace.

    Many containers share a host name and the number of their PID namespace; the kernel's boot id tells their machines
    apart.
    """
    space = Path("/proc/self/ns/pid")
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    where = f"{platform.node()} {space.readlink() if space.is_symlink() else ''} {boot}"
    return hashlib.sha256(where.encode()).hexdigest()[:8]


def unique_name(prefix: str, name: str) -> str:
    """A name that this process gives a file, and no other does."""
    return f"{prefix}{_token}-{name}"


def original_name(prefix: str, own: str) -> str | None:
    """Return the name that `own_name` was given, in any process, or None where it did not make this one."""
    match = _TOKEN.match(own, len(prefix)) if own.startswith(prefix) else None
    return None if match is None else own[match.end() :]


def is_temporary(name: str) -> bool:
    """Return whether `temporary_of` made this name, in any process. Other names that start alike are not ours."""
    return original_name(TEMPORARY_PREFIX, name) is not None


def is_abandoned(name: str, prefix: str = TEMPORARY_PREFIX) -> bool:
    """Whether a process gave a file this name that has died here; of others nobody here can tell."""
    where, _, rest = name.removeprefix(prefix).partition("-")
    number = rest.partition("-")[0]
    if not name.startswith(prefix) or os.name != "posix" or where != host_id() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        pass
    return False


_draw_token()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_draw_token)


def marker_name() -> str:
    """Return the name of the file by which this process knows a folder again. It is swept as a temporary file is."""
    return unique_name(TEMPORARY_PREFIX, "here")


@dataclass(frozen=True, slots=True)
class PinnedFolder:
    """A folder as it was when somebody began to write into it; its name may come to mean another one, or none.

    It can be sent to another process on this machine, which then writes into this folder or none.
    """

    path: Path
    identity: tuple[int, int] | None
    """Device and inode; None where there was no folder."""
    marker: str | None = None
    """Name of an empty file in the folder. It identifies the folder on mounts whose inode numbers change."""

    @classmethod
    def of(cls, path: Path | PinnedFolder) -> PinnedFolder:
        """Return a folder as it is now, with the marker that this process has put there. Raises StorageError."""
        if isinstance(path, PinnedFolder):
            return path
        marker = marker_name()
        with read_errors(path):
            identity = _identity(path)
        return cls(path, identity, marker if path_exists(path / marker) else None)

    def with_marker(self, marker: str | None = None) -> PinnedFolder:
        """Write a marker into the folder, by default that of this process, and return the folder with it.

        Raises StorageError.
        """
        name = marker or marker_name()
        with write_errors(self.path / name):
            (self.path / name).touch()
        return replace(self, marker=name)

    def remove_markers(self, inner: Iterable[str]) -> None:
        """Remove the marker from this folder and from inner ones. An error leaves it to the next sweep."""
        if self.marker is not None:
            for folder in (self.path, *(self.path / name for name in inner)):
                with suppress(OSError):
                    (folder / self.marker).unlink(missing_ok=True)

    def check(self) -> None:
        """See that the name still means this folder. Raises StorageError.

        Where a disk was unmounted, what is written would land beneath its mount point, and not be seen again. FUSE
        mounts may number their files anew between two calls, so an unexpected number alone proves nothing: the marker
        decides. That costs one more look at the disk, and only there.
        """
        with read_errors(self.path):
            found = _identity(self.path)
        if found is not None and found == self.identity:
            return
        if found is None or self.marker is None or not path_exists(self.path / self.marker):
            raise StorageError(
                f"{self.path} has gone since the run began: it was removed, renamed or unmounted, or another folder"
                " has taken its place; put it back and run again to go on"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    return found.st_dev, found.st_ino


def temporary_path(path: Path) -> Path:
    """The name that a file bears in this process, and in no other, until it is whole."""
    return path.with_name(unique_name(TEMPORARY_PREFIX, path.name))


@contextmanager
def atomic_write(path: Path, *, flush: bool = True, parents: bool = True) -> Iterator[Path]:
    """Give a temporary path to write to, and put what was written there in the place of `path` when all went well.

    With `flush` the disk holds the bytes before the name changes, and the name before this returns: a power cut leaves
    the old file or the new one, and after that the new one. Without `parents` the folder must be there. Raises
    StorageError.
    """
    temporary = temporary_path(path)
    with write_errors(path):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        _open.add(temporary)
        try:
            yield temporary
            if flush:
                fsync(temporary)
            os.replace(temporary, path)  # noqa: PTH105
        finally:
            temporary.unlink(missing_ok=True)
            _open.discard(temporary)
        if flush:
            fsync_folder(path.parent)


_open: set[Path] = set()


def remove_unfinished() -> None:
    """Remove the temporary files that this process is writing, before it ends without an exception."""
    for temporary in list(_open):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Say of what goes wrong with the disk in here which file it befell. Raises StorageError."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise StorageError(f"cannot write {path}: {reason}") from error


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Re-raise OSError as StorageError naming `path`: what cannot be looked at may well be there."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise StorageError(f"cannot read {path}: {reason}") from error


def path_exists(path: Path) -> bool:
    """Return whether a path exists, links not followed. Raises StorageError where that cannot be found out."""
    return _mode(path) != 0


def is_folder(path: Path, *, follow: bool = False) -> bool:
    """Return whether a path is a folder; a link to one counts with `follow`.

    Raises StorageError where that cannot be found out.
    """
    return stat.S_ISDIR(_mode(path, follow=follow))


def is_link(path: Path) -> bool:
    """Return whether a path is a symbolic link. Raises StorageError where that cannot be found out."""
    return stat.S_ISLNK(_mode(path))


def _mode(path: Path, *, follow: bool = False) -> int:
    """Return the mode of a path, 0 where it is missing. Raises StorageError."""
    with read_errors(path):
        try:
            return path.stat(follow_symlinks=follow).st_mode
        except OSError as error:
            if error.errno in _NOT_THERE:
                return 0
            raise


def list_names(folder: Path) -> list[str]:
    """Return the sorted names in a folder, none where it is missing. Raises StorageError where it cannot be listed.

    `Path.glob` returns nothing in that case.
    """
    with read_errors(folder):
        try:
            return sorted(os.listdir(folder))  # noqa: PTH208
        except FileNotFoundError:
            return []


def is_case_sensitive(folder: Path) -> bool:
    """Return whether names in a folder may differ by case alone, as they may not on NTFS, APFS, FAT and SMB.

    Writes a temporary file there and removes it. Raises StorageError.
    """
    probe = temporary_path(folder / "case")
    with write_errors(probe):
        probe.touch()
        try:
            return not path_exists(probe.with_name(probe.name.upper()))
        finally:
            probe.unlink(missing_ok=True)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def sweep(
    folder: Path, ours: Callable[[str], bool] = is_temporary, remove: Callable[[Path], object] = _unlink
) -> list[Path]:
    """Call `remove` with the files of one folder that have such names and return the folders in it, but no links.

    No file is opened or statted, however many there are. Raises OSError.
    """
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif ours(entry.name):
                remove(Path(entry.path))
    return folders


def make_folder(folder: Path) -> None:
    """Have a folder in one that is there already, and the disk hold its name. Raises StorageError."""
    with write_errors(folder):
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def fsync(path: Path) -> None:
    """Have the disk hold a file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Have the disk hold the names in a folder, where its file system can do that. Raises OSError."""
    try:
        fsync(folder)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise
