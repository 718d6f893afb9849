"""Lock the output folder OUT, read and write its run.json, and refuse an OUT that a run must not write to."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batch_infer.errors import SettingsError, StorageError, UsageError, first_line
from batch_infer.jobs.run_json import parse_record, require
from batch_infer.sinks import IMAGE_FOLDERS
from batch_infer.store import (
    PinnedFolder,
    atomic_write,
    fsync,
    fsync_folder,
    is_abandoned,
    is_temporary,
    list_names,
    locked_folder,
    path_exists,
    read_errors,
    sweep,
    temporary_path,
    write_errors,
)

FOLDERS = (*IMAGE_FOLDERS, "manifest", "logs")
RESULTS = ("results.parquet", "results.csv", "results.jsonl")
OWN_NAMES = (*FOLDERS, *RESULTS, "run.json")
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV}
_REMEDY = "remove it to continue from the manifest, or start anew in another --out"
CLEARING = "overwriting"
"""Key that run.json contains from when --overwrite begins to remove the old files of OUT until all are removed."""


@contextmanager
def locked(out: Path) -> Iterator[PinnedFolder]:
    """Lock OUT, creating it if missing, and yield it as a pinned folder.

    Remove from OUT, but not from its subfolders, the temporary files of dead processes on this machine and all
    temporary results.* files, which only the lock holder writes. An OSError for a path in OUT becomes StorageError.
    Raises LockedError, SettingsError, StorageError.
    """
    refuse_unprintable(out)
    with locked_folder(out, IMAGE_FOLDERS) as pinned:
        with write_errors(out):
            sweep(out, lambda name: is_abandoned(name) or (is_temporary(name) and name.endswith(RESULTS)))
        yield pinned


def refuse_unprintable(out: Path) -> None:
    """Raise SettingsError if the path is not UTF-8, since Parquet libraries do not accept such paths."""
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError as error:
        raise SettingsError(f"the path of OUT is not UTF-8: {os.fsencode(out)!r}; give another --out") from error


def read_run(out: Path) -> dict[str, Any] | None:
    """Return run.json after checking its types, or None if it does not exist. Raises UsageError, StorageError."""
    refuse_unprintable(out)
    path = out / "run.json"
    try:
        record = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (PermissionError, IsADirectoryError) as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}; {_REMEDY}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path} is not a JSON object; {_REMEDY}")
    try:
        parse_record(record)
    except ValueError as error:
        raise UsageError(f"{path} is damaged or was edited: {error}; {_REMEDY}") from error
    return record


def read_existing_run(out: Path) -> dict[str, Any]:
    """Return run.json. Raises StorageError and UsageError.

    UsageError means that OUT contains no run, that run.json is damaged, or that `run --overwrite` was stopped while
    clearing OUT.
    """
    record = read_run(out)
    if not record or "identity" not in record:
        raise UsageError(f"{out} contains no run: it has no run.json written by batch-infer")
    if record.get(CLEARING):
        raise UsageError(f"{out}: `run --overwrite` was stopped while removing old files; run again to continue")
    return record


def write_run(out: Path, record: Mapping[str, Any]) -> None:
    """Replace run.json. Raises StorageError."""
    with atomic_write(out / "run.json", parents=False) as temporary:
        _write_json(temporary, record)


def create_run_json(out: Path, record: Mapping[str, Any]) -> None:
    """Write run.json unless it exists. Raises StorageError.

    If several processes start at the same time, only one writes it, provided that the file system has hard links.
    """
    path = out / "run.json"
    temporary = temporary_path(path)
    with write_errors(path):
        try:
            _write_json(temporary, record)
            fsync(temporary)
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                if not path_exists(path):
                    temporary.replace(path)
            fsync_folder(out)
        finally:
            temporary.unlink(missing_ok=True)


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    # ASCII-only JSON escapes the surrogates in file names that are not valid UTF-8.
    path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="ascii")


def refuse_foreign_files(out: Path, tables: Iterable[Path], earlier: Mapping[str, Any] | None) -> None:
    """Raise SettingsError if a run would overwrite or remove its own tables or another program's files.

    Also raise it for the reasons of `_check_kinds`. Raises StorageError.
    """
    _check_kinds(out)
    own_paths = [(out / name).resolve() for name in OWN_NAMES]
    for table in tables:
        if any(table.resolve().is_relative_to(path) for path in own_paths):
            raise SettingsError(f"{table} is in a folder that a run into {out} writes to: give another --out")
    has_parts = any(name.startswith("part-") for name in list_names(out / "manifest"))
    if (earlier is None or "identity" not in earlier) and not has_parts:
        for name in RESULTS:
            if path_exists(out / name):
                raise SettingsError(f"{out / name} was not written by batch-infer: give another --out")


def _check_kinds(out: Path) -> None:
    """Refuse unsupported links, and files in place of folders or vice versa. Raises SettingsError, StorageError."""
    for name in OWN_NAMES:
        path = out / name
        with read_errors(path):
            try:
                mode = path.stat(follow_symlinks=name in IMAGE_FOLDERS).st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
        if stat.S_ISLNK(mode) and name in FOLDERS:
            raise SettingsError(
                f"{path} is a link; in OUT only images/ and quarantine/ may be links: replace it with a folder"
            )
        if stat.S_ISDIR(mode) != (name in FOLDERS):
            expected = "folder" if name in FOLDERS else "file"
            raise SettingsError(f"{path} is not a {expected}, but a run needs one: remove it or give another --out")


def refuse_while_rescoring(out: Path, record: Mapping[str, Any] | None) -> None:
    """Raise UsageError if a rescore is unfinished, since OUT then contains results under different safety settings."""
    if (record or {}).get("rescoring"):
        mode = require(parse_record(record).settings, "settings", out).safety.mode
        raise SettingsError(
            f"a rescore of {out} is unfinished: continue it with `batch-infer rescore {out} --safety {mode}` and its"
            " other options, or start anew with `run --overwrite`"
        )


def refuse_to_clear(out: Path) -> None:
    """Raise UsageError if OUT may contain another program's files or run.json is damaged. Raises StorageError."""
    names = (name for name in OWN_NAMES if name != "logs")  # a run that fails to start creates only logs/
    if "identity" not in (read_run(out) or {}) and any(path_exists(out / name) for name in names):
        raise SettingsError(
            f"--overwrite: {out} has no run.json written by batch-infer, so its files may belong to another program;"
            " remove them yourself"
        )
