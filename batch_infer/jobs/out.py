"""OUT: its lock, its run.json, and what of it is ours to remove."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from batch_infer.atomic import TEMPORARY, KnownFolder, is_abandoned, replacing, storing, sync, sync_folder, temporary_of
from batch_infer.errors import LockedError, SettingsError, UsageError, first_line
from batch_infer.jobs.run_json import parse_record, require
from batch_infer.records import now

OURS = ("images", "quarantine", "manifest", "logs", "results.parquet", "results.csv", "results.jsonl", "run.json")
LOCK_SECONDS = 0.2
"""How long a held OUT is waited for: `holder` holds it for a moment itself."""
_WAY_OUT = "remove it to go on with what the manifest holds, or start anew in another --out"


@contextmanager
def locked(out: Path) -> Iterator[KnownFolder]:
    """Hold OUT, made where it is missing. The lock dies with its holder. Raises LockedError, SettingsError.

    Gives the folder that it holds: nothing else makes OUT, and who writes there can see that it is still the same.
    """
    try:
        _make(out)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=LOCK_SECONDS, poll_interval=LOCK_SECONDS / 4)
    except Timeout:
        raise LockedError(f"{out} is held by another run ({_holder(out)}); run again when it has ended") from None
    except OSError as error:
        raise SettingsError(f"cannot write to {out}: {error.strerror or error}") from error
    held = KnownFolder.of(out)
    try:
        with replacing(out / ".holder", flush=False, parents=False) as temporary:
            temporary.write_text(f"{platform.node()}, process {os.getpid()}, since {now():%Y-%m-%d %H:%M:%S} UTC")
        with _pinned(out):
            yield held
    finally:
        if KnownFolder.of(out) == held:  # what has taken its place may be held by another
            (out / ".holder").unlink(missing_ok=True)
        lock.release()


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
        sync_folder(folder.parent)


def holder(out: Path) -> str | None:
    """Who works in OUT at this moment, None where nobody does."""
    lock = FileLock(out / ".lock")
    if not (out / ".lock").exists():
        return None
    try:
        with lock.acquire(timeout=LOCK_SECONDS, poll_interval=LOCK_SECONDS / 4):  # another may be looking too
            return None
    except Timeout:
        return _holder(out)
    except OSError:  # a folder that may only be read: who could be writing to it?
        return None


def _holder(out: Path) -> str:
    try:
        return (out / ".holder").read_text()
    except OSError:
        return "it has not said which"


def known_run(out: Path) -> dict[str, Any]:
    """The run.json of a run that was made. Raises UsageError."""
    found = read_run(out)
    if not found or "identity" not in found:
        raise UsageError(f"{out} holds no run of batch-infer: it has no run.json of ours")
    return found


def read_run(out: Path) -> dict[str, Any] | None:
    """Return run.json, with its keys of the types of `run_json`, or None where OUT has none. Raises UsageError."""
    path = out / "run.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
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
    with replacing(out / "run.json", parents=False) as temporary:
        _write_json(temporary, run)


def _write_json(path: Path, run: Mapping[str, Any]) -> None:
    # In ASCII: a file name may hold bytes that are no UTF-8, and comes back so.
    path.write_text(json.dumps(run, indent=2, default=str) + "\n", encoding="ascii")


def claim_run(out: Path, run: Mapping[str, Any]) -> None:
    """Write run.json unless OUT has one, so that of several processes one does. Raises StorageError."""
    path = out / "run.json"
    temporary = temporary_of(path)
    with storing(path):
        try:
            _write_json(temporary, run)
            sync(temporary)
            path.hardlink_to(temporary)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def restore_run(out: Path, earlier: Mapping[str, Any] | None) -> None:
    """Put run.json back as it was before this run. Raises StorageError."""
    if earlier is None:
        (out / "run.json").unlink(missing_ok=True)
    else:
        write_run(out, earlier)


def refuse_foreign(out: Path, tables: Iterable[Path], earlier: Mapping[str, Any] | None) -> None:
    """See that nothing which a run writes, or --overwrite removes, is somebody else's. Raises SettingsError."""
    ours = [(out / name).resolve() for name in OURS]
    for table in tables:
        if any(table.resolve().is_relative_to(path) for path in ours):
            raise SettingsError(f"{table} lies where a run into {out} writes its own files: give another --out")
    if (earlier is None or "identity" not in earlier) and not any((out / "manifest").glob("part-*.parquet")):
        found = [name for name in OURS if name.startswith("results.") and (out / name).exists()]
        if found:
            raise SettingsError(f"{out / found[0]} is there, and no run of batch-infer made it: give another --out")


def refuse_to_clear(out: Path) -> None:
    """See that what OUT holds was made by a run. Raises UsageError where it may be somebody's."""
    if "identity" not in (read_run(out) or {}) and any((out / name).exists() for name in OURS):
        raise SettingsError(
            f"--overwrite: {out} has no run.json of ours, so what it holds may be somebody's; remove it yourself"
        )


def clear(out: Path) -> None:
    """Remove what earlier runs made in OUT, and nothing else. Raises UsageError where OUT is not a run's."""
    refuse_to_clear(out)
    for name in OURS:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_leftovers(out: Path) -> None:
    """Remove what a killed run left in OUT: its temporary files, and its word on who holds OUT. Raises StorageError.

    For who holds OUT, or knows that nobody writes there. Folders that links lead to from within are not entered.
    """
    with storing(out):
        _sweep(out)
        folders = [out / name for name in OURS if (out / name).is_dir()]
        while folders:
            folders += _sweep(folders.pop())
        _remove_holder(out)


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove the temporary files that dead processes of this machine have left in these folders. Raises StorageError.

    For who shares OUT with others who are at work.
    """
    for folder in folders:
        with storing(folder), suppress(FileNotFoundError):
            _sweep(folder, is_abandoned)


def _sweep(folder: Path, ours: Callable[[str], bool] = lambda name: name.startswith(TEMPORARY)) -> list[Path]:
    """Remove the temporary files of one folder and return the folders in it: of a million files none is asked for."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif ours(entry.name):
                Path(entry.path).unlink(missing_ok=True)
    return folders


def _remove_holder(out: Path) -> None:
    """Remove what a killed run said of itself; who holds OUT now, be it this process, keeps its own."""
    if (out / ".holder").exists():
        with suppress(Timeout), FileLock(out / ".lock").acquire(timeout=0):
            (out / ".holder").unlink(missing_ok=True)
