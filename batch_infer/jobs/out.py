"""OUT: its lock, its run.json, and what of it is ours to remove."""

from __future__ import annotations

import errno
import json
import os
import platform
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from batch_infer import __version__
from batch_infer.errors import LockedError, SettingsError, StorageError, UsageError, first_line
from batch_infer.jobs.run_json import parse_record, require
from batch_infer.records import utc_now
from batch_infer.sinks import IMAGE_FOLDERS
from batch_infer.store import (
    PinnedFolder,
    atomic_write,
    fsync,
    fsync_folder,
    is_abandoned,
    is_temporary,
    list_names,
    path_exists,
    read_errors,
    sweep,
    temporary_path,
    write_errors,
)

LINKABLE = IMAGE_FOLDERS
"""Folders of OUT that may be links, to a larger disk."""
FOLDERS = (*LINKABLE, "manifest", "logs")
RESULTS = ("results.parquet", "results.csv", "results.jsonl")
OURS = (*FOLDERS, *RESULTS, "run.json")
LOCK_SECONDS = 0.2
"""How long a held OUT is waited for: a look at it holds it for a moment."""
_WRONG_OUT = {
    *(errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT),
    *(errno.ENOTDIR, errno.EPERM, errno.EROFS),
}
"""Errors of making OUT that another --out or other permissions mend. Others, such as a full disk, may pass."""
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV}
_WAY_OUT = "remove it to go on with what the manifest holds, or start anew in another --out"
_HALF_CLEARED = "overwriting"
"""Key of run.json while --overwrite removes what OUT holds."""


@contextmanager
def locked(out: Path) -> Iterator[PinnedFolder]:
    """Hold OUT, made where it is missing. The lock dies with its holder. Raises LockedError, SettingsError.

    Gives the folder that it holds: nothing else makes OUT, and who writes there can see that it is still the same.
    Temporary files of results that a killed holder has left are removed. An OSError that names a path in OUT ends as
    StorageError.
    """
    refuse_unprintable(out)
    path = out / ".lock"
    try:
        _make(out)
        _check_lock(path)
        lock = FileLock(path)
        lock.acquire(timeout=LOCK_SECONDS, poll_interval=LOCK_SECONDS / 4)
    except Timeout:
        raise LockedError(f"{out} is held by another run ({_holder(out)}); run again when it has ended") from None
    except OSError as error:
        kind = SettingsError if error.errno in _WRONG_OUT else StorageError
        raise kind(f"cannot write to {out}: {error.strerror or error}") from error
    known = PinnedFolder.of(out)
    try:
        with _pinned(out), storing_in(out):
            _write_holder(out)
            _sweep_results(out)
            known = known.with_marker()
            yield known
    finally:
        known.remove_markers(LINKABLE)
        with suppress(OSError, StorageError):  # else it would hide the error that ends the run
            if PinnedFolder.of(out).identity == known.identity:  # what has taken its place may be held by another
                (out / ".holder").unlink(missing_ok=True)
        lock.release()


@contextmanager
def storing_in(out: Path) -> Iterator[None]:
    """Re-raise an OSError that names a path in OUT as StorageError."""
    try:
        yield
    except OSError as error:
        names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
        if any(Path(name).is_relative_to(out) for name in names):
            raise StorageError(f"cannot write {names[-1]}: {error.strerror}") from error
        raise


def _write_holder(out: Path) -> None:
    with atomic_write(out / ".holder", flush=False, parents=False) as temporary:
        temporary.write_text(f"{platform.node()}, process {os.getpid()}, since {utc_now():%Y-%m-%d %H:%M:%S} UTC")


def _sweep_results(out: Path) -> None:
    """Remove the temporary files of results.*, which only a holder of OUT writes, and those of dead processes here."""
    with write_errors(out):
        sweep(out, lambda name: is_abandoned(name) or (is_temporary(name) and name.endswith(RESULTS)))


def _check_lock(path: Path) -> None:
    """See that the file system can lock. Raises SettingsError, StorageError for a fault that may pass, OSError.

    filelock takes a file that merely exists for the lock where flock is missing. Such a lock outlives its holder.
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
    """Return whether a process holds a lock file, which need only be readable. Raises OSError."""
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
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            return True
        raise
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _pinned(out: Path) -> Iterator[None]:
    """Keep OUT open: else a folder that is made in its place, once it was removed, may be given its inode."""
    try:
        descriptor = os.open(out, os.O_RDONLY)
    except OSError:  # Windows opens no folders, and removes none in which a file is open
        yield
        return
    try:
        yield
    finally:
        os.close(descriptor)


def _make(out: Path) -> None:
    """Make OUT and the folders above it, and have the disk hold their names. Raises OSError."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_folder(folder.parent)


def holder(out: Path) -> str | None:
    """Return which process holds OUT now, or None. Raises StorageError where the lock cannot be read."""
    path = out / ".lock"
    if not path_exists(path):
        return None
    with read_errors(path):
        return _holder(out) if _is_locked(path) else None


def _holder(out: Path) -> str:
    try:
        return (out / ".holder").read_text()
    except OSError:
        return "it has not said which"


def refuse_unprintable(out: Path) -> None:
    """Refuse a path that is not UTF-8: neither Parquet libraries nor JSON can name it. Raises SettingsError."""
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError as error:
        raise SettingsError(f"the path of OUT is not UTF-8: {os.fsencode(out)!r}; give another --out") from error


def known_run(out: Path) -> dict[str, Any]:
    """The run.json of a run that was made. Raises UsageError."""
    found = read_run(out)
    if not found or "identity" not in found:
        raise UsageError(f"{out} holds no run of batch-infer: it has no run.json of ours")
    if found.get(_HALF_CLEARED):
        raise UsageError(f"{out}: `run --overwrite` was stopped while it removed what was there; run again to go on")
    return found


def read_run(out: Path) -> dict[str, Any] | None:
    """Return run.json, with its keys of the types of `run_json`, or None where OUT has none. Raises UsageError."""
    refuse_unprintable(out)
    path = out / "run.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (PermissionError, IsADirectoryError) as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}; {_WAY_OUT}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} does not hold a JSON object; {_WAY_OUT}")
    try:
        parse_record(found)
    except ValueError as error:
        raise UsageError(f"{path} is damaged or was edited: {error}; {_WAY_OUT}") from error
    return found


def refuse_while_rescored(out: Path, record: Mapping[str, Any] | None) -> None:
    """Results that are of two kinds are for nobody else. Raises SettingsError."""
    if (record or {}).get("rescoring"):
        mode = require(parse_record(record).settings, "settings", out).safety.mode
        raise SettingsError(
            f"the images of {out} are being judged again, and that did not come to its end: go on with `batch-infer "
            f"rescore {out} --safety {mode}` and its other options, or start anew with `run --overwrite`"
        )


def write_run(out: Path, run: Mapping[str, Any]) -> None:
    """Write run.json. Raises StorageError."""
    with atomic_write(out / "run.json", parents=False) as temporary:
        _write_json(temporary, run)


def _write_json(path: Path, run: Mapping[str, Any]) -> None:
    # In ASCII: a file name may hold bytes that are no UTF-8, and comes back so.
    path.write_text(json.dumps(run, indent=2, default=str) + "\n", encoding="ascii")


def create_run_json(out: Path, run: Mapping[str, Any]) -> None:
    """Write run.json unless OUT has one, so that of several processes one does. Raises StorageError."""
    path = out / "run.json"
    temporary = temporary_path(path)
    with write_errors(path):
        try:
            _write_json(temporary, run)
            fsync(temporary)
            _link(temporary, path)
            fsync_folder(out)
        finally:
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name unless there is one of that name. Raises OSError."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if not path_exists(path):
            temporary.replace(path)


def restore_run(out: Path, earlier: Mapping[str, Any] | None) -> None:
    """Put run.json back as it was before this run. Raises StorageError."""
    if earlier is None:
        with write_errors(out / "run.json"):
            (out / "run.json").unlink(missing_ok=True)
    else:
        write_run(out, earlier)


def mark_half_cleared(out: Path) -> None:
    """Have run.json say that what OUT holds is being removed. Raises StorageError."""
    write_run(out, {"batch_infer": __version__, "identity": {}, _HALF_CLEARED: True})


def is_half_cleared(out: Path) -> bool:
    """Return whether an --overwrite was stopped before OUT was empty. Raises UsageError, StorageError."""
    return bool((read_run(out) or {}).get(_HALF_CLEARED))


def refuse_foreign_files(out: Path, tables: Iterable[Path], earlier: Mapping[str, Any] | None) -> None:
    """See that nothing which a run writes, or --overwrite removes, is somebody else's. Raises SettingsError."""
    _refuse_other_kinds(out)
    ours = [(out / name).resolve() for name in OURS]
    for table in tables:
        if any(table.resolve().is_relative_to(path) for path in ours):
            raise SettingsError(f"{table} lies where a run into {out} writes its own files: give another --out")
    parts = [name for name in list_names(out / "manifest") if name.startswith("part-")]
    if (earlier is None or "identity" not in earlier) and not parts:
        found = [name for name in RESULTS if path_exists(out / name)]
        if found:
            raise SettingsError(f"{out / found[0]} is there, and no run of batch-infer made it: give another --out")


def _refuse_other_kinds(out: Path) -> None:
    """Refuse files where folders belong, folders where files do, and links, which may lead anywhere.

    Raises SettingsError, StorageError.
    """
    for name in OURS:
        path = out / name
        with read_errors(path):
            try:
                kind = (path.stat() if name in LINKABLE else path.lstat()).st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
        if stat.S_ISLNK(kind) and name in FOLDERS:
            raise SettingsError(
                f"{path} is a link; in OUT only images/ and quarantine/ may be links: put the folder itself there"
            )
        if stat.S_ISDIR(kind) != (name in FOLDERS):
            wanted = "folder" if name in FOLDERS else "file"
            raise SettingsError(
                f"{path} is not a {wanted}, and a run writes one there: remove it or give another --out"
            )
