"""Recovery of OUT: the files of processes that died are removed, images set aside are restored, lost ones are found."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from batch_infer.errors import DamagedPart, StorageError
from batch_infer.jobs.out import OWN_NAMES
from batch_infer.manifest import SCHEMA, Manifest, ManifestIndex, commit_time, read_part
from batch_infer.sinks import BACKUP_PREFIX, IMAGE_FOLDERS, Sink, make_sink, original_path, resolve_path
from batch_infer.store import (
    fsync_folder,
    is_abandoned,
    is_folder,
    is_link,
    is_temporary,
    marker_name,
    path_exists,
    remove_stale_holder,
    sweep,
    write_errors,
)

RECENT_SECONDS = 600.0
"""Images of parts committed within this time before the last one are read.

Durable commits do not need this; disks and file systems that acknowledge a flush too early do.
"""
READING_THREADS = 8
BATCH = 2048
_DAMAGED = ".damaged"
_IMAGE = pa.schema([SCHEMA.field(name) for name in ("id", "image_index", "generated_image", "sha256", "image_bytes")])

log = logging.getLogger("batch_infer")

T = TypeVar("T")
Key = tuple[str, int]
OnDamage = Callable[[DamagedPart], object]


def recover(out: Path, since_run: int = 0) -> frozenset[Key]:
    """Clean up after a run that was killed, and return the keys of recent images that are missing or damaged.

    `since_run`: the first run after the last one that ended cleanly. Leftovers are removed, and damaged parts are set
    aside, so that their rows are rendered again. Images of the last minutes of those runs are read; older images, and
    the columns of older parts, are not. The caller holds the lock and has written nothing yet. Raises StorageError.
    """
    remove_leftovers(out, set_aside)
    recent = _recent_parts(Manifest(out).parts(since_run))
    sink, missing = make_sink(out), list[tuple[Key, str]]()
    with ManifestIndex(recent, set_aside) as index, ThreadPoolExecutor(READING_THREADS) as pool:
        for images in _stored_images(index):
            intact = pool.map(lambda image: is_intact(sink, *image[1:]), images)
            missing += [(key, path) for (key, path, *_), good in zip(images, intact, strict=True) if not good]
    if missing:
        log.warning(
            "%d images of the manifest are missing or damaged and must be rendered again, the first is %s",
            len(missing),
            out / missing[0][1],
        )
    return frozenset(key for key, _ in missing)


def remove_leftovers(out: Path, on_damage: OnDamage | None = None) -> None:
    """Remove what a killed run has left in OUT and restore the images that it had set aside.

    The caller holds the lock. Raises StorageError, and DamagedPart without `on_damage`.
    """
    restore_images(out, remove_temporary_files(out), lambda: Manifest(out).index(damaged=on_damage), on_damage)


def remove_temporary_files(out: Path) -> list[str]:
    """Remove the temporary files and the lock holder's name of a killed run; return the images that it had set aside.

    The paths are relative to OUT. The caller holds the lock, or knows that no other process writes there. Links are
    not followed, except that images/ and quarantine/ may be links. This process's own marker stays. Raises
    StorageError.
    """
    marker = marker_name()
    originals: list[str] = []

    def is_own(name: str) -> bool:
        return (is_temporary(name) and name != marker) or original_path(name) is not None

    with write_errors(out):
        _sweep(out, out, is_own, originals)
        folders = [out / name for name in OWN_NAMES if is_folder(out / name, follow=name in IMAGE_FOLDERS)]
        while folders:
            folders += _sweep(out, folders.pop(), is_own, originals)
        remove_stale_holder(out)
    return originals


def remove_abandoned(out: Path, folders: Iterable[Path]) -> list[str]:
    """Remove temporary files of dead processes of this machine from folders of OUT; return the images set aside.

    For a process that shares OUT with others that are writing. Links are not followed. Raises StorageError.
    """
    originals: list[str] = []
    for folder in folders:
        with write_errors(folder), suppress(FileNotFoundError, NotADirectoryError):
            if not is_link(folder):
                _sweep(out, folder, lambda name: is_abandoned(name) or is_abandoned(name, BACKUP_PREFIX), originals)
    return originals


def _sweep(out: Path, folder: Path, is_own: Callable[[str], bool], originals: list[str]) -> list[Path]:
    """Remove matching files, but add images that were set aside to `originals`. Return the folders in this one."""

    def remove(path: Path) -> None:
        if original_path(path.name) is None:
            path.unlink(missing_ok=True)
        elif resolve_path(out, aside := path.relative_to(out).as_posix()) is not None:
            originals.append(aside)

    return sweep(folder, is_own, remove)


def restore_images(
    out: Path,
    originals: Sequence[str],
    open_index: Callable[[], AbstractContextManager[ManifestIndex]],
    on_damage: OnDamage | None = None,
) -> None:
    """Restore images that were set aside for others which were never committed.

    `originals`: the paths of files set aside, which are removed where the image in place is the committed one.
    `on_damage` is called with each damaged part, before the index is opened again. Raises StorageError, and DamagedPart
    without `on_damage`.
    """
    while originals:
        try:
            with open_index() as index:
                _restore(out, index, originals)
            return
        except DamagedPart as damage:  # in columns that the index does not read
            if on_damage is None:
                raise
            on_damage(damage)


def _restore(out: Path, index: ManifestIndex, originals: Sequence[str]) -> None:
    places = {aside: original_path(aside) or aside for aside in originals}
    sink, committed = make_sink(out), index.get_by_paths(places.values())
    rows = index.take(list(committed.values()), _IMAGE).to_pylist()
    contents = {row["generated_image"]: (row["sha256"], row["image_bytes"]) for row in rows}
    for aside, path in places.items():
        content = contents.get(path, (None, None))
        if not is_intact(sink, path, *content) and is_intact(sink, aside, *content):
            sink.restore(aside)
        else:
            sink.remove(aside)


def set_aside(damage: DamagedPart) -> Path:
    """Rename a damaged part, so that its rows are rendered again, and return its new path. Raises StorageError."""
    part = damage.part
    path, number = part.with_name(f"{part.name}{_DAMAGED}"), 1
    while path_exists(path):  # a part of the same rows has the same name, and may be damaged too
        number += 1
        path = part.with_name(f"{part.name}{_DAMAGED}-{number}")
    with write_errors(path):
        os.rename(part, path)  # noqa: PTH104
        fsync_folder(part.parent)
    log.warning("%s is damaged (%s): its rows are rendered again, and it is kept as %s", part, damage.reason, path.name)
    return path


def is_intact(sink: Sink, path: str, sha256: str | None, length: int | None) -> bool:
    """Return whether an image is stored as it was written. Raises StorageError."""
    return read_intact(sink, path, sha256, length) is not None


def read_intact(sink: Sink, path: str, sha256: str | None, length: int | None) -> bytes | None:
    """Return an image as it was written, or None where it is missing, damaged or its path leads out of OUT.

    Raises StorageError where it cannot be read.
    """
    if length is None:
        return None
    try:
        content = sink.read(path, length)
    except StorageError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO:  # the disk has lost it
            return None
        raise
    return content if content is not None and hashlib.sha256(content).hexdigest() == sha256 else None


def _recent_parts(parts: Sequence[Path]) -> list[Path]:
    """Return the parts that were committed last, by the clock of each machine. Unreadable parts are set aside."""
    times = {part: time for part in parts if (time := _read_or_set_aside(commit_time, part)) is not None}
    latest: dict[str, float] = {}
    for clock, seconds in times.values():
        latest[clock] = max(seconds, latest.get(clock, seconds))
    recent = [part for part, (clock, seconds) in times.items() if seconds >= latest[clock] - RECENT_SECONDS]
    return [part for part in recent if _read_or_set_aside(read_part, part) is not None]


def _read_or_set_aside(read: Callable[[Path], T], part: Path) -> T | None:
    try:
        return read(part)
    except DamagedPart as damage:
        set_aside(damage)
        return None


def _stored_images(index: ManifestIndex) -> Iterator[list[tuple[Key, str, str | None, int | None]]]:
    """Yield the images of an index in batches: key, path, sha256 and length."""
    stored = (committed for committed in index.in_order([]) if committed.path is not None)
    while batch := list(islice(stored, BATCH)):
        columns = index.take(batch, _IMAGE).to_pydict()
        ids, numbers, *others = (columns[name] for name in _IMAGE.names)
        yield list(zip(zip(ids, numbers, strict=True), *others, strict=True))
