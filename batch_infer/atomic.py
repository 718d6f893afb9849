"""Files that appear whole or not at all: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from batch_infer.errors import StorageError

TEMPORARY = ".tmp-"
_NO_SUCH_CALL = {errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EISDIR}
"""What file systems say that do not let a folder be handed to the disk."""

_token = ""


def _draw_token() -> None:
    """Numbers of processes meet where several machines write into one folder; a token that is drawn does not."""
    global _token
    _token = f"{here()}-{os.getpid()}-{secrets.token_hex(6)}"


def here() -> str:
    """Where a process's number means this process: the machine, and on Linux what of it a container shows."""
    space = Path("/proc/self/ns/pid")
    told = f"{platform.node()} {space.readlink() if space.is_symlink() else ''}"
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def own_name(prefix: str, name: str) -> str:
    """A name that this process gives a file, and no other does."""
    return f"{prefix}{_token}-{name}"


def is_abandoned(name: str, prefix: str = TEMPORARY) -> bool:
    """Whether a process gave a file this name that has died here; of others nobody here can tell."""
    where, _, rest = name.removeprefix(prefix).partition("-")
    number = rest.partition("-")[0]
    if not name.startswith(prefix) or os.name != "posix" or where != here() or not number.isdecimal():
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


@dataclass(frozen=True, slots=True)
class KnownFolder:
    """A folder as it was when somebody began to write into it; its name may come to mean another one, or none.

    It can be sent to another process on this machine, which then writes into this folder or none.
    """

    path: Path
    identity: tuple[int, int] | None
    """Device and inode; None where there was no folder."""

    @classmethod
    def of(cls, path: Path | KnownFolder) -> KnownFolder:
        return path if isinstance(path, KnownFolder) else cls(path, _identity(path))

    def check(self) -> None:
        """See that the name still means this folder. Raises StorageError.

        Where a disk was unmounted, what is written would land beneath its mount point, and not be seen again.
        """
        if self.identity is None or _identity(self.path) != self.identity:
            raise StorageError(
                f"{self.path} has gone since the run began: it was removed, renamed or unmounted, or another folder"
                " has taken its place; put it back and run again to go on"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def temporary_of(path: Path) -> Path:
    """The name that a file bears in this process, and in no other, until it is whole."""
    return path.with_name(own_name(TEMPORARY, path.name))


@contextmanager
def replacing(path: Path, *, flush: bool = True, parents: bool = True) -> Iterator[Path]:
    """Give a temporary path to write to, and put what was written there in the place of `path` when all went well.

    With `flush` the disk holds the bytes before the name changes, and the name before this returns: a power cut leaves
    the old file or the new one, and after that the new one. Without `parents` the folder must be there. Raises
    StorageError.
    """
    temporary = temporary_of(path)
    with storing(path):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        _open.add(temporary)
        try:
            yield temporary
            if flush:
                sync(temporary)
            os.replace(temporary, path)  # noqa: PTH105
        finally:
            temporary.unlink(missing_ok=True)
            _open.discard(temporary)
        if flush:
            sync_folder(path.parent)


_open: set[Path] = set()


def remove_open() -> None:
    """Remove the temporary files that this process is writing, before it ends without an exception."""
    for temporary in list(_open):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Say of what goes wrong with the disk in here which file it befell. Raises StorageError."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise StorageError(f"cannot write {path}: {reason}") from error


def make_folder(folder: Path) -> None:
    """Have a folder in one that is there already, and the disk hold its name. Raises StorageError."""
    with storing(folder):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the disk hold the names in a folder, where its file system can do that. Raises OSError."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise
