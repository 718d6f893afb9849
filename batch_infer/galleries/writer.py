"""Write all files of a gallery."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import pyarrow as pa

from batch_infer import __version__
from batch_infer.galleries.assets import read_static_files, render_page
from batch_infer.galleries.pictures import Pictures
from batch_infer.galleries.scripts import to_script
from batch_infer.galleries.snapshot import CHUNK_ROWS, Snapshot
from batch_infer.galleries.tiles import Images, Tile, TileCounts, TileMaker, TileOptions
from batch_infer.records import Status
from batch_infer.store import Store

MARK = "gallery.mark"
"""Name of the file by which a folder is recognised as a gallery. Its suffix is not that of a table."""
VERSION = 1
"""Version of the data files. The page and the data of one gallery always have the same version."""
_MARK_CONTENT = b"Written by `batch-infer gallery`, which replaces and removes files in this folder.\n"


@dataclass(frozen=True, slots=True)
class GalleryInfo:
    """What the page says about the run. `gallery_id` is the key under which it keeps ratings in the browser.

    `out` is OUT as the user named it, without secrets, for the commands that the page shows. `run` describes the run.
    """

    title: str
    out: str
    gallery_id: str
    left_out: int
    generated_at: float
    run: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class GalleryTotals:
    """What was written: the number of pictures by their origin, and of old ones that were removed."""

    counts: TileCounts
    removed: int


def is_gallery(store: Store, prefix: str = "") -> bool:
    """Return whether the files of a store whose names start with `prefix` are a gallery. Raises StorageError."""
    return store.read(f"{prefix}{MARK}") == _MARK_CONTENT


def write_gallery(
    store: Store,
    snapshot: Snapshot,
    images: Images,
    info: GalleryInfo,
    options: TileOptions,
    on_progress: Callable[[int], object] = lambda _: None,
) -> GalleryTotals:
    """Write a gallery of the results in a snapshot, replacing an older one. The caller holds the lock of `store`.

    Thumbnails of unchanged images are kept. The data appear together at the end, so that an interrupted call leaves the
    old page. `on_progress` receives the number of results so far, and may raise an exception to stop. Raises
    StorageError.
    """
    if not is_gallery(store):
        store.create(MARK, _MARK_CONTENT)
    with Pictures(store) as pictures, _Files(store) as files, _thread_pool(options.threads) as pool:
        maker = TileMaker(images, pictures, options, pool)
        for number, chunk in enumerate(snapshot.chunks()):
            tiles = maker.make(chunk, on_progress)
            for kind, columns in _to_columns(snapshot, chunk, tiles).items():
                files.add(f"data/{kind}-{number:05d}.js", to_script(kind, number, {"columns": columns}))
        for name, content in read_static_files().items():
            files.add(f"static/{name}", content)
        files.add("data/meta.js", to_script("meta", 0, _describe(snapshot, info)))
        files.add("index.html", render_page(info.title, info.generated_at, VERSION))
        files.publish()
        return GalleryTotals(maker.counts, pictures.sweep())


class _Files:
    """The data and the page, which appear together."""

    def __init__(self, store: Store) -> None:
        self._store, self._names = store, list[str]()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.discard_staged(self._names)

    def add(self, name: str, content: bytes) -> None:
        self._names.append(name)  # first, so that a stop in the next line leaves no file
        self._store.stage(name, content)

    def publish(self) -> None:
        """Replace the old files, and remove those that are no longer needed."""
        self._store.publish(self._names)
        kept, self._names = set(self._names), []
        self._store.remove([name for name in self._store.find(["data", "static"], lambda _: True) if name not in kept])


@contextmanager
def _thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool. An exception cancels the work that has not begun."""
    pool = ThreadPoolExecutor(threads, "gallery")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _to_columns(snapshot: Snapshot, chunk: pa.Table, tiles: Sequence[Tile]) -> dict[str, dict[str, Any]]:
    """Return the values of a chunk by data file and column."""
    rows: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for column in snapshot.columns:
        values = chunk[column.source]
        if not column.is_detail:
            rows[column.name] = column.to_row_values(values)
        if (detail_values := column.to_detail_values(values)) is not None:
            details[column.name] = detail_values
    rows |= {"_thumb": [tile.thumb for tile in tiles], "_problem": [tile.problem for tile in tiles]}
    details["_image"] = [tile.image for tile in tiles]
    return {"rows": rows, "details": details}


def _describe(snapshot: Snapshot, info: GalleryInfo) -> dict[str, Any]:
    """Return the content of meta.js."""
    return {
        "version": VERSION,
        "title": info.title,
        "out": info.out,
        "gallery_id": info.gallery_id,
        "generated_at": round(info.generated_at, 3),
        "generator": f"batch-infer {__version__}",
        "rows": snapshot.rows,
        "left_out": info.left_out,
        "chunk": CHUNK_ROWS,
        "chunks": -(-snapshot.rows // CHUNK_ROWS),
        "columns": [column.describe() for column in snapshot.columns],
        "counts": {status: snapshot.statuses[status] for status in get_args(Status)},
        "run": dict(info.run),
    }
