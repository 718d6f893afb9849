"""Recovery: what a run that did not end in order has left in OUT, and what the disk has lost of it."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pyarrow as pa

from batch_infer.errors import DamagedPart, StorageError
from batch_infer.jobs import cleanup
from batch_infer.manifest import SCHEMA, Manifest, ManifestIndex, commit_time, read_part
from batch_infer.sinks import Sink, make_sink, original_path
from batch_infer.store import fsync_folder, path_exists, write_errors

RECENT_SECONDS = 600.0
"""Parts committed within this time before the last one are checked.

Where commits are durable nothing needs this; a disk or a file system that promises what it does not do needs it.
"""
READING_THREADS = 8
BATCH = 2048
_DAMAGED = ".damaged"
_IMAGE = pa.schema([SCHEMA.field(name) for name in ("id", "image_index", "generated_image", "sha256", "image_bytes")])

log = logging.getLogger("batch_infer")

Key = tuple[str, int]


def recover(out: Path, manifest: Manifest, since_run: int = 0) -> frozenset[Key]:
    """Clear up after a run that was killed, and return the key of each recent image that is missing or not whole.

    `since_run`: the first run after the last one that ended in order. Leftovers are removed and damaged parts set
    aside, whose rows are then as if they had never been rendered. The images of the last minutes of those runs are
    read; older images, and the columns of older parts, are not. The caller holds OUT, before anything is written there.
    Raises StorageError.
    """
    remove_leftovers(out, manifest, set_aside)
    recent = _recent(manifest.parts(since_run))
    sink = make_sink(out)
    with ManifestIndex(recent, set_aside) as index, ThreadPoolExecutor(READING_THREADS) as pool:
        lost: list[tuple[Key, str]] = []
        for images in _images(index):
            whole = pool.map(lambda image: is_whole(sink, *image[1:]), images)
            lost += [(key, path) for (key, path, *_), kept in zip(images, whole, strict=True) if not kept]
    if lost:
        sentence = "%d images of the manifest are missing or not whole and must be rendered again, the first is %s"
        log.warning(sentence, len(lost), out / lost[0][1])
    return frozenset(key for key, _ in lost)


def remove_leftovers(out: Path, manifest: Manifest, damaged: Callable[[DamagedPart], object] | None = None) -> None:
    """Remove what a killed run has left in OUT and restore the images that it had set aside.

    The caller holds OUT. `damaged` is that of `Manifest.index`. Raises DamagedPart without it, StorageError.
    """
    originals = cleanup.remove_leftovers(out)
    while originals:
        try:
            with manifest.index(damaged=damaged) as index:
                restore(out, index, originals)
            return
        except DamagedPart as damage:  # in columns that the index does not read
            if damaged is None:
                raise
            damaged(damage)


def restore(out: Path, index: ManifestIndex, originals: Sequence[str]) -> None:
    """Bring back images that were set aside for others which were never committed.

    `originals`: paths that `set_aside` gave. Where the image in place is the one that the manifest has, the one set
    aside is removed. Raises DamagedPart, StorageError.
    """
    former = {aside: original_path(aside) or aside for aside in originals}
    sink, committed = make_sink(out), index.get_by_paths(former.values())
    rows = index.take(list(committed.values()), _IMAGE).to_pylist()
    of_path = {row["generated_image"]: (row["sha256"], row["image_bytes"]) for row in rows}
    for aside, path in former.items():
        content = of_path.get(path, (None, None))
        if not is_whole(sink, path, *content) and is_whole(sink, aside, *content):
            sink.restore(aside)
        else:
            sink.remove(aside)


def set_aside(damage: DamagedPart) -> Path:
    """Give a damaged part a name that nobody takes for a part, so that its rows are rendered anew; returns its path.

    Raises StorageError.
    """
    part = damage.part
    kept, number = part.with_name(f"{part.name}{_DAMAGED}"), 1
    while path_exists(kept):  # a part that is made anew bears the same name, and may be damaged too
        number += 1
        kept = part.with_name(f"{part.name}{_DAMAGED}-{number}")
    with write_errors(kept):
        os.rename(part, kept)  # noqa: PTH104
        fsync_folder(part.parent)
    log.warning("%s is damaged (%s): its rows are rendered anew, and it is kept as %s", part, damage.reason, kept.name)
    return kept


def is_whole(sink: Sink, path: str, sha256: str | None, length: int | None) -> bool:
    """Whether an image is there with the content that was written. Raises StorageError."""
    return read_whole(sink, path, sha256, length) is not None


def read_whole(sink: Sink, path: str, sha256: str | None, length: int | None) -> bytes | None:
    """Return an image as it was written, or None where it is missing or damaged.

    `path` is relative to OUT; one that leads out of it is missing. Raises StorageError where it cannot be read.
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


def _recent(parts: Sequence[Path]) -> list[Path]:
    """Return the parts that were committed last, by the clock of each machine, and can be read."""
    times = list(_commit_times(parts))
    latest: dict[str, float] = {}
    for _, clock, seconds in times:
        latest[clock] = max(seconds, latest.get(clock, seconds))
    return [part for part, clock, at in times if at >= latest[clock] - RECENT_SECONDS and _is_readable(part)]


def _commit_times(parts: Sequence[Path]) -> Iterator[tuple[Path, str, float]]:
    for part in parts:
        try:
            yield part, *commit_time(part)
        except DamagedPart as error:
            set_aside(error)


def _is_readable(part: Path) -> bool:
    """Whether all columns of a part can be read, else it is set aside."""
    try:
        read_part(part)
    except DamagedPart as error:
        set_aside(error)
        return False
    return True


def _images(index: ManifestIndex) -> Iterator[list[tuple[Key, str, str | None, int | None]]]:
    """The images that an index knows, in batches: key, path, sha256 and length."""
    found = (committed for committed in index.in_order([]) if committed.path is not None)
    while batch := list(islice(found, BATCH)):
        columns = index.take(batch, _IMAGE).to_pydict()
        names, numbers, *others = (columns[name] for name in _IMAGE.names)
        yield list(zip(zip(names, numbers, strict=True), *others, strict=True))
