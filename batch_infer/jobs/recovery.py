"""Recovery: what a run that did not end in order has left in OUT, and what the disk has lost of it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.atomic import storing, sync_folder
from batch_infer.errors import DamagedPart
from batch_infer.jobs import out as outdir
from batch_infer.manifest import SCHEMA, Index, Manifest, read_part

RECENT = timedelta(minutes=10)
"""How long before the last result an image must have been finished to be taken for safe on the disk.

Where commits are durable nothing needs this; a disk or a file system that promises what it does not do needs it.
"""
READING_THREADS = 8
BATCH = 2048
_DAMAGED = ".damaged"
_IMAGE = pa.schema([SCHEMA.field(name) for name in ("id", "image_index", "generated_image", "sha256", "image_bytes")])

log = logging.getLogger("batch_infer")

Key = tuple[str, int]


def recover(out: Path, manifest: Manifest) -> frozenset[Key]:
    """Clear up after a run that was killed, and return the key of each recent image that is missing or not whole.

    Leftovers are removed and damaged parts set aside, whose rows are then as if they had never been rendered. Images
    that were finished within the last minutes are read; older ones, and the columns of older parts, are left to who
    reads them. For who holds OUT, before anybody writes there. Raises StorageError.
    """
    outdir.remove_leftovers(out)
    recent, since = _recent(manifest)
    with Index(recent, since, set_aside) as index, ThreadPoolExecutor(READING_THREADS) as pool:
        lost: list[tuple[Key, str]] = []
        for images in _images(index):
            whole = pool.map(lambda image: is_whole(out, *image[1:]), images)
            lost += [(key, path) for (key, path, *_), kept in zip(images, whole, strict=True) if not kept]
    if lost:
        sentence = "%d images of the manifest are missing or not whole and must be rendered again, the first is %s"
        log.warning(sentence, len(lost), out / lost[0][1])
    return frozenset(key for key, _ in lost)


def set_aside(damage: DamagedPart) -> Path:
    """Give a damaged part a name that nobody takes for a part, so that its rows are rendered anew; returns its path.

    Raises StorageError.
    """
    part = damage.part
    kept, number = part.with_name(f"{part.name}{_DAMAGED}"), 1
    while kept.exists():  # a part that is made anew bears the same name, and may be damaged too
        number += 1
        kept = part.with_name(f"{part.name}{_DAMAGED}-{number}")
    with storing(kept):
        os.rename(part, kept)  # noqa: PTH104
        sync_folder(part.parent)
    log.warning("%s is damaged (%s): its rows are rendered anew, and it is kept as %s", part, damage.reason, kept.name)
    return kept


def is_whole(out: Path, path: str, sha256: str | None, length: int | None) -> bool:
    """Whether an image is there with the content that was written. `path` is relative to OUT, and does not leave it."""
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts:
        return False
    try:
        if (out / relative).stat().st_size != length:
            return False
        return hashlib.sha256((out / relative).read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def _recent(manifest: Manifest) -> tuple[list[Path], datetime | None]:
    """The parts that hold recent results, each of them whole, and since when a result is recent."""
    ends = dict(_ends(manifest.parts()))
    if not ends:
        return [], None
    since = max(ends.values()) - RECENT
    return [part for part, end in ends.items() if end >= since and _is_readable(part)], since


def _ends(parts: Sequence[Path]) -> Iterator[tuple[Path, datetime]]:
    """When the last result of each part was finished."""
    for part in parts:
        try:
            end = pc.max(read_part(part, ("finished_at",))["finished_at"]).as_py()
        except DamagedPart as error:
            set_aside(error)
        else:
            if end is not None:
                yield part, end


def _is_readable(part: Path) -> bool:
    """Whether all columns of a part can be read, else it is set aside."""
    try:
        read_part(part)
    except DamagedPart as error:
        set_aside(error)
        return False
    return True


def _images(index: Index) -> Iterator[list[tuple[Key, str, str | None, int | None]]]:
    """The images that an index knows, in batches: key, path, sha256 and length."""
    found = (committed for committed in index.in_order([]) if committed.path is not None)
    while batch := list(islice(found, BATCH)):
        columns = index.take(batch, _IMAGE).to_pydict()
        names, numbers, *others = (columns[name] for name in _IMAGE.names)
        yield list(zip(zip(names, numbers, strict=True), *others, strict=True))
