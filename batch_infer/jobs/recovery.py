"""Recover OUT from killed processes: remove their files, restore images that they set aside, and find lost images."""

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

from batch_infer.errors import DamagedPartError, StorageError
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
"""Seconds before the last commit. Images committed since then are read and checked.

Only disks and file systems that acknowledge a flush too early need this.
"""
READING_THREADS = 8
BATCH = 2048
_DAMAGED = ".damaged"
_IMAGE = pa.schema([SCHEMA.field(name) for name in ("id", "image_index", "generated_image", "sha256", "image_bytes")])

log = logging.getLogger("batch_infer")

T = TypeVar("T")
Key = tuple[str, int]
OnDamage = Callable[[DamagedPartError], object]


def recover(out: Path, since_run: int = 0) -> frozenset[Key]:
    """Clean up after a killed run, and return the keys of recent images that are missing or damaged.

    `since_run` is the first run after the last one that ended cleanly. Removes leftovers and sets damaged parts aside,
    so that their rows are rendered again. Reads images from the last minutes of those runs, but not older images or
    the columns of older parts. The caller holds the lock and has written nothing yet. Raises StorageError.
    """
    remove_leftovers(out, set_aside)
    recent = _recent_parts(Manifest(out).parts(since_run))
    sink, missing = make_sink(out), list[tuple[Key, str]]()
    with ManifestIndex(recent, set_aside) as index, ThreadPoolExecutor(READING_THREADS) as pool:
        for images in _stored_images(index):
            intact = pool.map(lambda image: is_intact(sink, *image[1:]), images)
            for (key, path, *_), image_is_intact in zip(images, intact, strict=True):
                if not image_is_intact:
                    missing.append((key, path))
    if missing:
        log.warning(
            "%d images of the manifest are missing or damaged and must be rendered again, the first is %s",
            len(missing),
            out / missing[0][1],
        )
    return frozenset(key for key, _ in missing)


def remove_leftovers(out: Path, on_damage: OnDamage | None = None) -> None:
    """Remove what a killed run left in OUT and restore the images that it set aside.

    The caller holds the lock. Raises StorageError, and DamagedPartError if `on_damage` is None.
    """
    restore_images(out, remove_temporary_files(out), lambda: Manifest(out).index(on_damage=on_damage), on_damage)


def remove_temporary_files(out: Path) -> list[str]:
    """Remove a killed run's temporary files and lock holder file. Return the images that it set aside.

    Paths are relative to OUT. The caller holds the lock, or knows that no other process writes there. Only images/ and
    quarantine/ may be links; no other link is followed. Keeps this process's marker. Raises StorageError.
    """
    marker = marker_name()
    originals: list[str] = []

    def is_leftover(name: str) -> bool:
        return (is_temporary(name) and name != marker) or original_path(name) is not None

    with write_errors(out):
        _sweep(out, out, is_leftover, originals)
        folders = [out / name for name in OWN_NAMES if is_folder(out / name, follow=name in IMAGE_FOLDERS)]
        while folders:
            folders += _sweep(out, folders.pop(), is_leftover, originals)
        remove_stale_holder(out)
    return originals


def remove_abandoned(out: Path, folders: Iterable[Path]) -> list[str]:
    """Remove temporary files of this machine's dead processes from folders of OUT. Return the images set aside.

    Safe while other processes write to OUT. Links are not followed. Raises StorageError.
    """

    def is_leftover(name: str) -> bool:
        return is_abandoned(name) or is_abandoned(name, BACKUP_PREFIX)

    originals: list[str] = []
    for folder in folders:
        with write_errors(folder), suppress(FileNotFoundError, NotADirectoryError):
            if not is_link(folder):
                _sweep(out, folder, is_leftover, originals)
    return originals


def _sweep(out: Path, folder: Path, is_leftover: Callable[[str], bool], originals: list[str]) -> list[Path]:
    """Remove leftover files, but add images that were set aside to `originals`. Return the subfolders."""

    def remove(path: Path) -> None:
        if original_path(path.name) is None:
            path.unlink(missing_ok=True)
            return
        backup = path.relative_to(out).as_posix()
        if resolve_path(out, backup) is not None:
            originals.append(backup)

    return sweep(folder, is_leftover, remove)


def restore_images(
    out: Path,
    originals: Sequence[str],
    open_index: Callable[[], AbstractContextManager[ManifestIndex]],
    on_damage: OnDamage | None = None,
) -> None:
    """Restore images that were set aside for replacements that were never committed.

    `originals` holds the paths of the files set aside. A file is removed if its replacement was committed. `on_damage`
    is called with each damaged part before the index is opened again. Raises StorageError, and DamagedPartError if
    `on_damage` is None.
    """
    while originals:
        try:
            with open_index() as index:
                _restore(out, index, originals)
            return
        except DamagedPartError as damage:  # in columns that opening the index does not read
            if on_damage is None:
                raise
            on_damage(damage)


def _restore(out: Path, index: ManifestIndex, originals: Sequence[str]) -> None:
    path_by_backup = {backup: original_path(backup) or backup for backup in originals}
    sink, committed = make_sink(out), index.get_by_paths(path_by_backup.values())
    rows = index.read_results(list(committed.values()), _IMAGE).to_pylist()
    contents = {row["generated_image"]: (row["sha256"], row["image_bytes"]) for row in rows}
    for backup, path in path_by_backup.items():
        sha256, length = contents.get(path, (None, None))
        if not is_intact(sink, path, sha256, length) and is_intact(sink, backup, sha256, length):
            sink.restore(backup)
        else:
            sink.remove(backup)


def set_aside(damage: DamagedPartError) -> Path:
    """Rename a damaged part so that its rows are rendered again. Return its new path. Raises StorageError."""
    part = damage.part
    path, number = part.with_name(f"{part.name}{_DAMAGED}"), 1
    while path_exists(path):  # an earlier damaged part of the same rows may have this name
        number += 1
        path = part.with_name(f"{part.name}{_DAMAGED}-{number}")
    with write_errors(path):
        os.rename(part, path)  # noqa: PTH104
        fsync_folder(part.parent)
    log.warning("%s is damaged (%s): its rows are rendered again, and it is kept as %s", part, damage.reason, path.name)
    return path


def is_intact(sink: Sink, path: str, sha256: str | None, length: int | None) -> bool:
    """Return whether a stored image is unchanged since it was written. Raises StorageError."""
    return read_intact(sink, path, sha256, length) is not None


def read_intact(sink: Sink, path: str, sha256: str | None, length: int | None) -> bytes | None:
    """Return an image as it was written, or None if it is missing or damaged, or its path leads out of OUT.

    Raises StorageError if it cannot be read.
    """
    if length is None:
        return None
    try:
        content = sink.read(path, length)
    except StorageError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO:  # damaged on disk
            return None
        raise
    return content if content is not None and hashlib.sha256(content).hexdigest() == sha256 else None


def _recent_parts(parts: Sequence[Path]) -> list[Path]:
    """Return the most recent parts by each machine's clock. Set unreadable parts aside."""
    times = {part: time for part in parts if (time := _read_or_set_aside(commit_time, part)) is not None}
    latest: dict[str, float] = {}
    for clock, seconds in times.values():
        latest[clock] = max(seconds, latest.get(clock, seconds))
    recent = [part for part, (clock, seconds) in times.items() if seconds >= latest[clock] - RECENT_SECONDS]
    return [part for part in recent if _read_or_set_aside(read_part, part) is not None]


def _read_or_set_aside(read: Callable[[Path], T], part: Path) -> T | None:
    try:
        return read(part)
    except DamagedPartError as damage:
        set_aside(damage)
        return None


def _stored_images(index: ManifestIndex) -> Iterator[list[tuple[Key, str, str | None, int | None]]]:
    """Yield the images of an index in batches of (key, path, sha256, length in bytes)."""
    stored = (committed for committed in index.iterate_in_table_order([]) if committed.path is not None)
    while batch := list(islice(stored, BATCH)):
        columns = index.read_results(batch, _IMAGE).to_pydict()
        keys = zip(columns["id"], columns["image_index"], strict=True)
        paths, hashes, lengths = columns["generated_image"], columns["sha256"], columns["image_bytes"]
        yield list(zip(keys, paths, hashes, lengths, strict=True))
