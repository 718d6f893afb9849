"""Find or make the pictures of a chunk of results, on several threads."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import pyarrow as pa

from batch_infer.errors import RowError
from batch_infer.galleries.pictures import Pictures, make_name
from batch_infer.galleries.thumbnails import make_pictures

WAITING_PER_THREAD = 4
"""Number of images for each thread that may be in progress or finished, which bounds the memory."""
MISSING = "its file is missing"
CHANGED = "its file is damaged, or another program has changed it"


class Images(Protocol):
    """Reads the images of results. `path` may come from an edited manifest. Methods but `read` run in one thread."""

    def has(self, path: str) -> bool:
        """Return whether an image exists. Raises StorageError."""
        ...

    def read(self, path: str) -> bytes | None:
        """Return an image's bytes, or None if it is missing. Called from several threads.

        Raises RowError if this image cannot be read, and StorageError if others cannot be read either.
        """
        ...

    def link(self, path: str) -> str | None:
        """Return the URL of an image relative to the page, or None if the page cannot link to it."""
        ...


class Tile(NamedTuple):
    """What the page shows of an image: its thumbnail in thumbs/, the URL of the whole image, and what is wrong."""

    thumb: str | None = None
    image: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class TileOptions:
    """Longer side of thumbnails in pixels, and number of threads that make them."""

    size: int
    threads: int


@dataclass(slots=True)
class TileCounts:
    """Number of thumbnails that were made and that existed, and of images that are missing or damaged."""

    made: int = 0
    kept: int = 0
    unreadable: int = 0


class _NewPictures(NamedTuple):
    """The SHA-256 of an image's bytes, its thumbnail and its preview, and what is wrong with the image."""

    sha256: str = ""
    thumb: bytes | None = None
    preview: bytes | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _ImageRequest:
    """An image by its path and recorded SHA-256, and which pictures of it are needed."""

    path: str
    sha256: str | None
    is_flagged: bool
    link: str | None

    @property
    def needs_preview(self) -> bool:
        """Whether the page can show the whole image only if a copy is stored. There are no copies of flagged images."""
        return self.link is None and not self.is_flagged


class TileMaker:
    """Makes the tiles of results."""

    def __init__(self, images: Images, pictures: Pictures, options: TileOptions, pool: ThreadPoolExecutor) -> None:
        self._images, self._pictures, self._size = images, pictures, options.size
        self._pool, self._max_waiting = pool, options.threads * WAITING_PER_THREAD
        self._done = 0
        self.counts = TileCounts()

    def make(self, chunk: pa.Table, on_progress: Callable[[int], object]) -> list[Tile]:
        """Return the tiles of a chunk of results in their order, and store their pictures. Raises StorageError.

        `on_progress` receives the number of tiles so far, including those of earlier chunks.
        """
        tiles: list[Tile] = []

        def finish(request: _ImageRequest | None, work: Future[_NewPictures] | Tile) -> None:
            tiles.append(self._finish(request, work))
            self._done += 1
            on_progress(self._done)

        waiting: deque[tuple[_ImageRequest | None, Future[_NewPictures] | Tile]] = deque()
        for request in _iterate_images(chunk, self._images):
            waiting.append((request, self._start(request) if request else Tile()))
            while waiting and (len(waiting) >= self._max_waiting or isinstance(waiting[0][1], Tile)):
                finish(*waiting.popleft())
        for last_request, work in waiting:
            finish(last_request, work)
        self._pictures.publish()
        return tiles

    def _start(self, request: _ImageRequest) -> Future[_NewPictures] | Tile:
        """Return the tile of an image whose pictures exist, or begin to make them."""
        if not self._images.has(request.path):
            return Tile(problem=MISSING)
        if request.sha256 is not None and self._has_pictures(request, request.sha256):
            self.counts.kept += 1
            return self._make_tile(request, request.sha256)
        return self._pool.submit(_make, self._images, request, self._size)

    def _has_pictures(self, request: _ImageRequest, sha256: str) -> bool:
        paths = [f"thumbs/{self._thumb_name(request, sha256)}"]
        if request.needs_preview:
            paths.append(f"previews/{_preview_name(sha256)}")
        return all(map(self._pictures.has, paths))

    def _finish(self, request: _ImageRequest | None, work: Future[_NewPictures] | Tile) -> Tile:
        """Return the tile of an image, and store its pictures."""
        if request is None or isinstance(work, Tile):
            tile = work if isinstance(work, Tile) else Tile()
        else:
            tile = self._store(request, work.result())
        self.counts.unreadable += tile.problem is not None
        return tile

    def _store(self, request: _ImageRequest, pictures: _NewPictures) -> Tile:
        if pictures.thumb is None:
            return Tile(problem=pictures.problem)
        self._pictures.stage(f"thumbs/{self._thumb_name(request, pictures.sha256)}", pictures.thumb)
        if pictures.preview is not None:
            self._pictures.stage(f"previews/{_preview_name(pictures.sha256)}", pictures.preview)
        self.counts.made += 1
        return self._make_tile(request, pictures.sha256)._replace(problem=pictures.problem)

    def _make_tile(self, request: _ImageRequest, sha256: str) -> Tile:
        preview = f"previews/{_preview_name(sha256)}" if request.needs_preview else None
        return Tile(self._thumb_name(request, sha256), request.link or preview)

    def _thumb_name(self, request: _ImageRequest, sha256: str) -> str:
        return make_name("thumbnail", self._size, request.is_flagged, sha256)


def _preview_name(sha256: str) -> str:
    return make_name("preview", sha256)


def _iterate_images(chunk: pa.Table, images: Images) -> Iterator[_ImageRequest | None]:
    """Yield the image of each result, or None for a result without one."""
    names = ("generated_image", "sha256", "status", "nsfw_content_detected")
    for path, sha256, status, is_nsfw in zip(*(chunk[name].to_pylist() for name in names), strict=True):
        yield (
            None
            if path is None
            else _ImageRequest(path, sha256, status == "flagged" or bool(is_nsfw), images.link(path))
        )


def _make(images: Images, request: _ImageRequest, size: int) -> _NewPictures:
    """Read an image and make its pictures. Raises StorageError."""
    try:
        content = images.read(request.path)
        if content is None:
            return _NewPictures(problem=MISSING)
        sha256 = hashlib.sha256(content).hexdigest()
        thumb, preview = make_pictures(
            content, size, is_blurred=request.is_flagged, needs_preview=request.needs_preview
        )
    except RowError as error:
        return _NewPictures(problem=str(error))
    return _NewPictures(sha256, thumb, preview, None if request.sha256 in (None, sha256) else CHANGED)
