"""Recover OUT after processes were killed: remove their temporary files, restore images, and find missing ones."""

from __future__ import annotations

import errno
import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import PurePath
from typing import Any, TypeVar

import pyarrow as pa

from batch_infer.errors import DamagedPartError, StorageError
from batch_infer.jobs.out import FOLDERS
from batch_infer.jobs.summary import Counts
from batch_infer.manifest import SCHEMA, Manifest, ManifestIndex, commit_time, read_part
from batch_infer.sinks import Sink, is_image_path, make_sink, original_path
from batch_infer.store import Out, Store, StoredFile, is_temporary, marker_name, open_store, prefetch

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


def recover(out: Out, since_run: int = 0) -> frozenset[tuple[str, int]]:
    """Clean up after killed runs, and return the keys of recent images that are missing or damaged.

    `since_run` is the first run after the last one that ended cleanly. Remove leftovers, and set aside the damaged
    parts that are found, so that their rows are rendered again. To save time, check only images that were committed in
    the last RECENT_SECONDS of these runs, and read only their parts in full. The caller holds the lock and has written
    nothing yet. Raises StorageError, NewerPartError.
    """
    store = open_store(out)
    on_damage = partial(set_aside, store)
    retry_without_damaged_parts(lambda: remove_leftovers(store), on_damage)
    sink, missing = make_sink(store), list[dict[str, Any]]()
    recent = _recent_parts(Manifest(store).parts(since_run))
    with ManifestIndex(recent, on_damage) as index, ThreadPoolExecutor(READING_THREADS) as pool:
        committed = (image for image in index.iterate_in_table_order([]) if image.path is not None)
        while batch := list(islice(committed, BATCH)):
            rows = index.read_results(batch, _IMAGE).to_pylist()
            intact = pool.map(lambda row: is_intact(sink, *(row[name] for name in _CONTENT)), rows)
            missing += [row for row, is_row_intact in zip(rows, intact, strict=True) if not is_row_intact]
    if missing:
        log.warning(
            "%d committed images are missing or damaged and must be rendered again; the first is %s",
            len(missing),
            store.locate(missing[0]["generated_image"]),
        )
    return frozenset((row["id"], row["image_index"]) for row in missing)


def remove_leftovers(out: Out) -> None:
    """Remove a killed run's temporary files from OUT, and restore or remove its image backups.

    The caller holds the lock, whose marker is kept. Links are not followed, except images/ and quarantine/. Raises
    StorageError, and DamagedPartError or NewerPartError if there are backups.
    """
    store, marker = open_store(out), marker_name()

    def is_leftover(name: str) -> bool:
        return (is_temporary(name) and name != marker) or original_path(name) is not None

    leftovers = store.find(["", *FOLDERS], is_leftover)
    if backups := remove_temporary_files(store, leftovers):
        with Manifest(store).index() as index:
            restore_images(store, backups, index)


def remove_temporary_files(store: Store, leftovers: Iterable[str]) -> list[str]:
    """Remove leftover files, but keep image backups and return their paths. Raises StorageError."""
    backups = []
    for name in leftovers:
        if original_path(name) is None:
            store.remove([name])
        elif is_image_path(name):
            backups.append(name)
    return backups


def restore_images(store: Store, backups: Sequence[str], index: ManifestIndex) -> None:
    """Restore image backups whose replacements were not committed, and remove all others.

    `backups` contains the paths of the backups. A backup is restored if it matches the committed result and the file at
    its original path does not. Raises StorageError, and DamagedPartError before changing any file.
    """
    path_by_backup = {backup: original_path(backup) or backup for backup in backups}
    committed = index.get_by_paths(path_by_backup.values())
    rows = index.read_results(list(committed.values()), _IMAGE).to_pylist()
    contents = {row["generated_image"]: (row["sha256"], row["image_bytes"]) for row in rows}
    sink = make_sink(store)
    for backup, path in path_by_backup.items():
        sha256, byte_count = contents.get(path, (None, None))
        if not is_intact(sink, path, sha256, byte_count) and is_intact(sink, backup, sha256, byte_count):
            sink.restore(backup)
        else:
            sink.remove(backup)


def remove_unnamed_images(store: Store, record: Mapping[str, Any], counts: Counts, committed: Collection[str]) -> None:
    """Remove from shards the images that no result names: replaced ones, and those of killed runs.

    This is left to a later command if rows have no result yet, since their parts may only be moved away, or if a worker
    on another machine was lost, since it may still be writing. `record` is run.json, `counts` are those of the merge,
    and `committed` are the shards that this command committed. The caller holds the lock. Raises StorageError,
    DamagedPartError, NewerPartError.
    """
    sink = make_sink(store)
    if not record.get("has_strays") and not counts.remaining and sink.list_shards():
        with Manifest(store).index() as index:
            sink.remove_unnamed(index.iterate_shard_members(), committed)


def set_aside(store: Store, damage: DamagedPartError) -> str:
    """Rename a damaged part so that its rows are rendered again. Return its new path in OUT. Raises StorageError."""
    part = f"manifest/{PurePath(damage.part).name}"
    path, number = f"{part}{_DAMAGED}", 1
    while store.exists(path):  # a damaged part with the same rows may have this name
        number += 1
        path = f"{part}{_DAMAGED}-{number}"
    store.rename(part, path)
    message = "%s is damaged (%s): its rows are rendered again, and it is kept as %s"
    log.warning(message, damage.part, damage.reason, PurePath(path).name)
    return path


def retry_without_damaged_parts(work: Callable[[], T], on_damage: Callable[[DamagedPartError], object]) -> T:
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
    """Return the bytes of an image, or None if it is missing, damaged or outside images/, quarantine/ and shards/.

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


def _recent_parts(parts: Sequence[StoredFile]) -> list[StoredFile]:
    """Return the parts of the last RECENT_SECONDS of each clock (see `commit_time`). Set damaged parts aside."""
    times = {part: time for part in prefetch(parts) if (time := _read_or_set_aside(commit_time, part)) is not None}
    latest: dict[str, float] = {}
    for clock, seconds in times.values():
        latest[clock] = max(seconds, latest.get(clock, seconds))
    recent = [part for part, (clock, seconds) in times.items() if seconds >= latest[clock] - RECENT_SECONDS]
    return [part for part in recent if _read_or_set_aside(read_part, part) is not None]


def _read_or_set_aside(read: Callable[[StoredFile], T], part: StoredFile) -> T | None:
    try:
        return read(part)
    except DamagedPartError as damage:
        set_aside(part.store, damage)
        return None
