"""Files that appear whole or not at all: written under a name that only this process uses, then renamed."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batch_infer.store.paths import fsync, fsync_folder, path_exists, write_errors

TEMPORARY_PREFIX = ".tmp-"
_TOKEN = re.compile(r"[0-9a-f]{8}-\d+-[0-9a-f]{12}-(?=.)")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_token = ""
_unfinished: set[Path] = set()


def host_id() -> str:
    """Return a digest of where process numbers are unique: host name, and on Linux boot and PID namespace.

    Many containers share a host name and the number of their PID namespace; the kernel's boot id tells their machines
    apart.
    """
    namespace = Path("/proc/self/ns/pid")
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    host = f"{platform.node()} {namespace.readlink() if namespace.is_symlink() else ''} {boot}"
    return hashlib.sha256(host.encode()).hexdigest()[:8]


def _set_token() -> None:
    """Set what makes names unique: process numbers may be equal where several machines write into one folder."""
    global _token
    _token = f"{host_id()}-{os.getpid()}-{secrets.token_hex(6)}"


_set_token()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_set_token)


def unique_name(prefix: str, name: str) -> str:
    """Return a variant of a file name that no other process uses."""
    return f"{prefix}{_token}-{name}"


def original_name(prefix: str, name: str) -> str | None:
    """Return the name from which any process made this `unique_name`, or None if it is not one."""
    match = _TOKEN.match(name, len(prefix)) if name.startswith(prefix) else None
    return None if match is None else name[match.end() :]


def temporary_path(path: Path) -> Path:
    """Return where this process writes a file until it is complete."""
    return path.with_name(unique_name(TEMPORARY_PREFIX, path.name))


def is_temporary(name: str) -> bool:
    """Return whether any process made this name with `temporary_path`. Other names that start alike are not ours."""
    return original_name(TEMPORARY_PREFIX, name) is not None


def is_abandoned(name: str, prefix: str = TEMPORARY_PREFIX) -> bool:
    """Return whether a process of this machine made this `unique_name` and has died. Of others that is unknown."""
    host, _, rest = name.removeprefix(prefix).partition("-")
    number = rest.partition("-")[0]
    if not name.startswith(prefix) or os.name != "posix" or host != host_id() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:  # a process of another user
        pass
    return False


@contextmanager
def atomic_write(path: Path, *, flush: bool = True, parents: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` unless an exception is raised.

    With `flush` the bytes are durable before the rename, and the rename before this returns: a power cut leaves the
    old file or the new one. Without `parents` the folder must exist. Raises StorageError.
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
    """Remove the temporary files that this process is writing, before it exits without an exception."""
    for temporary in list(_unfinished):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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


def sweep(
    folder: Path,
    is_ours: Callable[[str], bool] = is_temporary,
    remove: Callable[[Path], object] = lambda path: path.unlink(missing_ok=True),
) -> list[Path]:
    """Call `remove` with the files of a folder whose names are ours, and return its folders without links.

    No file is opened or statted, however many there are. Raises OSError.
    """
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif is_ours(entry.name):
                remove(Path(entry.path))
    return folders
