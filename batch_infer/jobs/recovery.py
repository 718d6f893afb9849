"""Recover OUT after processes were killed: remove their temporary files, restore images, and find missing ones."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

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
"""Recovery checks images that were committed up to this many seconds before the last commit by the same clock.

This finds images that a disk or file system lost because it acknowledged a flush too early. See `commit_time`.
"""
READING_THREADS = 8
BATCH = 2048
"""Maximum number of images to look up together."""
_DAMAGED = ".damaged"
_CONTENT = ("generated_image", "sha256", "image_bytes")
_IMAGE = pa.schema([SCHEMA.field(name) for name in ("id", "image_index", *_CONTENT)])

log = logging.getLogger("batch_infer")

T = TypeVar("T")


def recover(out: Path, since_run: int = 0) -> frozenset[tuple[str, int]]:
    """Clean up after killed runs, and return the keys of recent images that are missing or damaged.

    `since_run` is the first run after the last one that ended cleanly. Remove leftovers, and set aside the damaged
    parts that are found, so that their rows are rendered again. To save time, check only images that were committed in
    the last RECENT_SECONDS of these runs, and read only their parts in full. The caller holds the lock and has written
    nothing yet. Raises StorageError, NewerPartError.
    """
    retry_without_damaged_parts(lambda: remove_leftovers(out))
    sink, missing = make_sink(out), list[dict[str, Any]]()
    recent = _recent_parts(Manifest(out).parts(since_run))
    with ManifestIndex(recent, set_aside) as index, ThreadPoolExecutor(READING_THREADS) as pool:
        committed = (image for image in index.iterate_in_table_order([]) if image.path is not None)
        while batch := list(islice(committed, BATCH)):
            rows = index.read_results(batch, _IMAGE).to_pylist()
            intact = pool.map(lambda row: is_intact(sink, *(row[name] for name in _CONTENT)), rows)
            missing += [row for row, is_row_intact in zip(rows, intact, strict=True) if not is_row_intact]
    if missing:
        log.warning(
            "%d committed images are missing or damaged and must be rendered again; the first is %s",
            len(missing),
            out / missing[0]["generated_image"],
        )
    return frozenset((row["id"], row["image_index"]) for row in missing)


def remove_leftovers(out: Path) -> None:
    """Remove a killed run's temporary files and lock holder file from OUT, and restore or remove its image backups.

    The caller holds the lock, whose marker is kept. Links are not followed, except images/ and quarantine/. Raises
    StorageError, and DamagedPartError or NewerPartError if there are backups.
    """
    marker = marker_name()
    backups: list[str] = []

    def is_leftover(name: str) -> bool:
        return (is_temporary(name) and name != marker) or original_path(name) is not None

    with write_errors(out):
        _sweep(out, out, is_leftover, backups)
        folders = [out / name for name in OWN_NAMES if is_folder(out / name, follow=name in IMAGE_FOLDERS)]
        while folders:
            folders += _sweep(out, folders.pop(), is_leftover, backups)
        remove_stale_holder(out)
    if backups:
        with Manifest(out).index() as index:
            restore_images(out, backups, index)


def remove_abandoned(out: Path, folders: Iterable[Path]) -> list[str]:
    """Remove temporary files of dead processes on this machine. Return the paths of their image backups.

    `folders` are in OUT, to which other processes may be writing. Links are not followed. Raises StorageError.
    """

    def is_leftover(name: str) -> bool:
        return is_abandoned(name) or is_abandoned(name, BACKUP_PREFIX)

    backups: list[str] = []
    for folder in folders:
        with write_errors(folder), suppress(FileNotFoundError, NotADirectoryError):
            if not is_link(folder):
                _sweep(out, folder, is_leftover, backups)
    return backups


def _sweep(out: Path, folder: Path, is_leftover: Callable[[str], bool], backups: list[str]) -> list[Path]:
    """Remove leftover files, but keep image backups and add their paths to `backups`. Return subfolders."""

    def remove(path: Path) -> None:
        if original_path(path.name) is None:
            path.unlink(missing_ok=True)
            return
        backup = path.relative_to(out).as_posix()
        if resolve_path(out, backup) is not None:
            backups.append(backup)

    return sweep(folder, is_leftover, remove)


def restore_images(out: Path, backups: Sequence[str], index: ManifestIndex) -> None:
    """Restore image backups whose replacements were not committed, and remove all others.

    `backups` contains the paths of the backups. A backup is restored if it matches the committed result and the file at
    its original path does not. Raises StorageError, and DamagedPartError before changing any file.
    """
    path_by_backup = {backup: original_path(backup) or backup for backup in backups}
    committed = index.get_by_paths(path_by_backup.values())
    rows = index.read_results(list(committed.values()), _IMAGE).to_pylist()
    contents = {row["generated_image"]: (row["sha256"], row["image_bytes"]) for row in rows}
    sink = make_sink(out)
    for backup, path in path_by_backup.items():
        sha256, byte_count = contents.get(path, (None, None))
        if not is_intact(sink, path, sha256, byte_count) and is_intact(sink, backup, sha256, byte_count):
            sink.restore(backup)
        else:
            sink.remove(backup)


def set_aside(damage: DamagedPartError) -> Path:
    """Rename a damaged part so that its rows are rendered again. Return its new path. Raises StorageError."""
    part = damage.part
    path, number = part.with_name(f"{part.name}{_DAMAGED}"), 1
    while path_exists(path):  # a damaged part with the same rows may have this name
        number += 1
        path = part.with_name(f"{part.name}{_DAMAGED}-{number}")
    with write_errors(path):
        os.rename(part, path)  # noqa: PTH104
        fsync_folder(part.parent)
    log.warning("%s is damaged (%s): its rows are rendered again, and it is kept as %s", part, damage.reason, path.name)
    return path


def retry_without_damaged_parts(
    work: Callable[[], T], on_damage: Callable[[DamagedPartError], object] = set_aside
) -> T:
    """Call `work` until it raises no DamagedPartError, and return its value. Call `on_damage` after each such error.

    Raises the other errors of `work`, and those of `on_damage`.
    """
    while True:
        try:
            return work()
        except DamagedPartError as damage:
            on_damage(damage)


def is_intact(sink: Sink, path: str, sha256: str | None, byte_count: int | None) -> bool:
    """Return whether the image at a path exists and has this hash and size. Raises StorageError."""
    return read_intact(sink, path, sha256, byte_count) is not None


def read_intact(sink: Sink, path: str, sha256: str | None, byte_count: int | None) -> bytes | None:
    """Return the bytes of an image, or None if it is missing, damaged or outside images/ and quarantine/.

    Raises StorageError if it cannot be read for another reason.
    """
    if byte_count is None:
        return None
    try:
        content = sink.read(path, byte_count)
    except StorageError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO:  # damaged on disk
            return None
        raise
    return content if content is not None and hashlib.sha256(content).hexdigest() == sha256 else None


def _recent_parts(parts: Sequence[Path]) -> list[Path]:
    """Return the parts of the last RECENT_SECONDS of each clock (see `commit_time`). Set damaged parts aside."""
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
