"""What runs leave in OUT, removed: all of it before a run starts anew, and the leftovers of processes that died."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from batch_infer.errors import DamagedPart, Interrupted, SettingsError, UsageError
from batch_infer.jobs.out import LINKABLE, OURS, mark_half_cleared, read_run
from batch_infer.manifest import Manifest, read_part
from batch_infer.sinks import BACKUP_PREFIX, make_sink, original_path, resolve_path
from batch_infer.store import (
    fsync_folder,
    is_abandoned,
    is_folder,
    is_link,
    is_temporary,
    list_names,
    marker_name,
    path_exists,
    sweep,
    write_errors,
)


def refuse_to_clear(out: Path) -> None:
    """Refuse an OUT that may hold the files of something else than a run. Raises UsageError."""
    held = (name for name in OURS if name != "logs")  # logs/ is kept; a run that could not start leaves only that
    if "identity" not in (read_run(out) or {}) and any(path_exists(out / name) for name in held):
        raise SettingsError(
            f"--overwrite: {out} has no run.json of ours, so what it holds may be somebody's; remove it yourself"
        )


def clear(out: Path, stop: Callable[[], bool] = lambda: False) -> None:
    """Remove what earlier runs made in OUT, except logs/, and nothing else.

    Raises UsageError where OUT is not a run's, StorageError, and Interrupted where `stop` says so on the way.
    run.json says first that OUT is being cleared, until the caller replaces it: killed at any moment between, OUT holds
    no results for any command, and the next run continues. Where images/ or quarantine/ is a link to a larger disk, the
    link stays, and of what it leads to only the files are removed that the manifest names.
    """
    refuse_to_clear(out)
    if not path_exists(out / "run.json"):
        return
    mark_half_cleared(out)
    linked = [name for name in LINKABLE if is_link(out / name)]
    if linked:
        _remove_named_images(out)
    for name in ("manifest", *(name for name in OURS if name not in ("manifest", "logs", "run.json", *linked))):
        for path in (*_folders(out / name), out / name):
            if stop():
                raise Interrupted(f"stopped while --overwrite removed what {out} held; run again to continue")
            _remove(path)
    with write_errors(out):
        fsync_folder(out)


def _folders(path: Path) -> Iterator[Path]:
    """Return the folders in one, none for a file."""
    inner = (path / name for name in (list_names(path) if is_folder(path) else ()))
    return (folder for folder in inner if is_folder(folder))


def _remove(path: Path) -> None:
    with write_errors(path):
        if is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _remove_named_images(out: Path) -> None:
    """Remove the images that the manifest names, and the folders that are empty then."""
    sink, folders = make_sink(out), set()
    for part in Manifest(out).parts():
        try:
            paths = read_part(part, ("generated_image",))["generated_image"].drop_null().to_pylist()
        except (DamagedPart, UsageError):
            continue
        for path in paths:
            sink.remove(path)
            if (image := resolve_path(out, path)) is not None:
                folders.add(image.parent)
    for folder in folders:
        if folder.parent.parent == out and not is_link(folder):
            with suppress(OSError):  # not empty
                folder.rmdir()


def remove_leftovers(out: Path) -> list[str]:
    """Remove the temporary files of a killed run, and its note on who holds OUT. Raises StorageError.

    Returns the paths, relative to OUT, of images that were set aside; `recovery` restores them. The caller holds OUT,
    or knows that no other process writes there. Links are not followed, except that images/ and quarantine/ may
    themselves be links. The marker by which this process knows its folders stays.
    """
    marker = marker_name()
    originals: list[str] = []

    def ours(name: str) -> bool:
        return (is_temporary(name) and name != marker) or original_path(name) is not None

    with write_errors(out):
        _sweep(out, out, ours, originals)
        folders = [out / name for name in OURS if is_folder(out / name, follow=name in LINKABLE)]
        while folders:
            folders += _sweep(out, folders.pop(), ours, originals)
        _remove_holder(out)
    return originals


def remove_abandoned(out: Path, folders: Iterable[Path]) -> list[str]:
    """Remove the temporary files that dead processes of this machine have left in these folders of OUT.

    For a process that shares OUT with others which are writing. Returns the paths of images that those processes had
    set aside. Links are not followed. Raises StorageError.
    """
    originals: list[str] = []
    for folder in folders:
        with write_errors(folder), suppress(FileNotFoundError, NotADirectoryError):
            if not is_link(folder):
                _sweep(out, folder, lambda name: is_abandoned(name) or is_abandoned(name, BACKUP_PREFIX), originals)
    return originals


def _sweep(out: Path, folder: Path, ours: Callable[[str], bool], originals: list[str]) -> list[Path]:
    """Remove such files, but add images that were set aside to `originals`. Return the folders in this one."""

    def remove(path: Path) -> None:
        if original_path(path.name) is None:
            path.unlink(missing_ok=True)
        elif resolve_path(out, aside := path.relative_to(out).as_posix()) is not None:
            originals.append(aside)

    return sweep(folder, ours, remove)


def _remove_holder(out: Path) -> None:
    """Remove what a killed run said of itself; who holds OUT now, be it this process, keeps its own."""
    if path_exists(out / ".holder"):
        with suppress(Timeout), FileLock(out / ".lock").acquire(timeout=0):
            (out / ".holder").unlink(missing_ok=True)
