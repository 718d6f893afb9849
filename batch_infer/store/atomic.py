"""Write files atomically: under a name unique to this process, then renamed."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from batch_infer.store.paths import fsync, fsync_folder, path_exists, write_errors

TEMPORARY_PREFIX = ".tmp-"
_TOKEN = re.compile(r"[0-9a-f]{8}-\d+-[0-9a-f]{12}-(?=.)")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RANDOM_ID = secrets.token_hex(6)
"""Distinguishes two machines that write to the same folder, if their host ids and process ids are equal."""
_unfinished: set[Path] = set()


@cache
def host_id() -> str:
    """Return a digest of the host name and, on Linux, the boot id and PID namespace, in which process ids are unique.

    Many containers have the same host name and PID namespace number. The kernel's boot id distinguishes their machines.
    """
    namespace = Path("/proc/self/ns/pid")
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    host = f"{platform.node()} {namespace.readlink() if namespace.is_symlink() else ''} {boot}"
    return hashlib.sha256(host.encode()).hexdigest()[:8]


def unique_name(prefix: str, name: str) -> str:
    """Return a variant of a file name that no other process uses."""
    return f"{prefix}{host_id()}-{os.getpid()}-{_RANDOM_ID}-{name}"


def original_name(prefix: str, name: str) -> str | None:
    """Return the file name inside a `unique_name` from any process, or None if `name` is not a unique name."""
    match = _TOKEN.match(name, len(prefix)) if name.startswith(prefix) else None
    return None if match is None else name[match.end() :]


def temporary_path(path: Path) -> Path:
    """Return the path to which this process writes a file until it is complete."""
    return path.with_name(unique_name(TEMPORARY_PREFIX, path.name))


def is_temporary(name: str) -> bool:
    """Return whether a name comes from `temporary_path` in any process."""
    return original_name(TEMPORARY_PREFIX, name) is not None


def is_abandoned(name: str, prefix: str = TEMPORARY_PREFIX) -> bool:
    """Return whether a `unique_name` comes from a dead process of this machine, or False if that is unknown."""
    host, _, rest = name.removeprefix(prefix).partition("-")
    process_id = rest.partition("-")[0]
    if not name.startswith(prefix) or os.name != "posix" or host != host_id() or not process_id.isdecimal():
        return False
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return True
    except OSError:  # the process belongs to another user
        pass
    return False


@contextmanager
def atomic_write(path: Path, *, flush: bool = True, parents: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` unless an exception is raised.

    With `flush`, a power cut leaves the old or the new file: the bytes are durable before the rename, and the rename
    is durable on return. Without `parents`, the folder must exist. Raises StorageError.
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
    """Remove this process's unfinished files. For a process that exits without raising an exception."""
    for temporary in list(_unfinished):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_case_sensitive(folder: Path) -> bool:
    """Return whether names in a folder may differ only by case. On NTFS, APFS, FAT and SMB they may not.

    Creates and removes a temporary file in the folder. Raises StorageError.
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
    is_ours: Callable[[str], bool],
    remove: Callable[[Path], object] = lambda path: path.unlink(missing_ok=True),
) -> list[Path]:
    """Call `remove` for each of our files in a folder, and return the subfolders that are not links.

    No file is opened or statted, since there may be many. Raises OSError.
    """
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif is_ours(entry.name):
                remove(Path(entry.path))
    return folders
