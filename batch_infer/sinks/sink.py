"""Define the interface of sinks, and create sinks by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import pyarrow as pa

from batch_infer.records import PromptRequest, StoredImage
from batch_infer.settings import IMAGE_SUFFIXES, ImageFormat, SinkName
from batch_infer.sinks.folder import FolderSink
from batch_infer.sinks.names import Collisions, ImageIndex
from batch_infer.sinks.parquet import ParquetFormat
from batch_infer.sinks.sharded import ShardedSink
from batch_infer.sinks.shards import CommitLimits
from batch_infer.sinks.webdataset import TarFormat
from batch_infer.store import FileDigest, Out


class Sink(Protocol):
    """Stores images in OUT, and reads the images of every sink. Paths of type str are relative to OUT.

    An image is a file in IMAGE_FOLDERS or part of a shard: `shards/NAME.tar#KEY.png`. Paths elsewhere count as missing.
    Shards contain only images with status ok. Other images are in quarantine/ if `quarantine` is set, otherwise in
    images/. The file name of a backup is a `store.unique_name` with BACKUP_PREFIX, so that recovery finds the backups
    of killed runs and their `original_path`. A crash loses no image if the steps are in this order: `write`, `back_up`
    the images to replace, `publish`, commit the manifest part, `remove` the backups. All methods may raise
    StorageError, for example if they cannot determine whether an image exists.
    """

    commit_limits: CommitLimits | None
    """How many rows to commit together, or None for the default."""

    def path_of(self, request: PromptRequest, *, is_flagged: bool = False, quarantine: bool = False) -> str:
        """Return the path for a request's image until `publish`. Rendering an image again keeps its file's path."""

    def possible_paths(self, request: PromptRequest) -> set[str]:
        """Return every path that this or an earlier version may have used only for this request's image."""

    def path_in(self, path: str, *, quarantine: bool) -> str:
        """Return an image's path, changed to be in quarantine/ if `quarantine` is set, otherwise in images/."""

    def path_after_rescore(
        self, path: str, request: PromptRequest, *, is_flagged: bool = False, quarantine: bool = False
    ) -> str:
        """Return the path for a committed image after a new verdict, until `publish`. It is `path` if that can stay."""

    def folders_of(self, files: Iterable[str]) -> list[str]:
        """Return images/, quarantine/ and those of their subfolders that may contain images from these source files."""

    def collisions(self, index: ImageIndex) -> Collisions:
        """Return an object that finds collisions with the names of committed images."""

    def write(self, path: str, content: bytes) -> StoredImage:
        """Write an image under a temporary name."""

    def publish(self, paths: Iterable[str], make_rows: Callable[[], pa.Table]) -> Mapping[str, str]:
        """Make written images durable, just before a manifest part lists them. Return the new paths of moved images.

        `make_rows` returns the results of at least these images. A run that ends between `write` and `publish` replaces
        no committed image.
        """

    def back_up(self, paths: Iterable[str]) -> None:
        """Keep committed images under other names before `publish` replaces them. Missing images are skipped."""

    def backup_path(self, path: str) -> str:
        """Return the path under which `back_up` keeps an image in this process."""

    def restore(self, backup: str) -> None:
        """Restore a backup. Any process may have written it and died before it committed the new image."""

    def remove(self, *paths: str) -> None:
        """Remove those of these image files that exist. Images in shards stay until `remove_unnamed`."""

    def remove_unnamed(self, paths: Iterable[str], committed: Collection[str] = ()) -> None:
        """Remove all images from shards except these, which are sorted. No other process may write to OUT.

        `committed` are the shards that the caller has just committed. If `paths` lacks one of them, a network file
        system lists the manifest as it was, so no shard is removed as a whole.
        """

    def has(self, path: str) -> bool:
        """Return whether an image exists at this path."""

    def list_files(self, folder: str) -> set[str]:
        """Return the names of the image files in a folder of OUT."""

    def list_shards(self) -> list[str]:
        """Return the paths of the shards."""

    def list_images(self, *, needs_sizes: bool = True) -> Iterator[tuple[str, int | None]]:
        """Yield the path and size in bytes of all images, as `Store.list_image_files` does."""

    def read(self, path: str, length: int | None = None) -> bytes | None:
        """Return an image's bytes, or None if it is missing or its size differs from `length`, if given."""

    def hash(self, images: Sequence[tuple[str, int]]) -> list[FileDigest | None]:
        """Return the digests of images that `list_images` yielded, as `Store.hash_images` does."""


SINKS: dict[SinkName, Callable[[Out, str], Sink]] = {
    "folder": FolderSink,
    "webdataset": lambda out, suffix: ShardedSink(TarFormat(), out, suffix),
    "parquet": lambda out, suffix: ShardedSink(ParquetFormat(), out, suffix),
}
"""Sinks by name. Each is created with OUT and the suffix of image files. `tests/test_sinks.py` tests all of them."""


def make_sink(out: Out, image_format: ImageFormat = "png", name: SinkName = "folder") -> Sink:
    """Create a sink that stores images in OUT, and reads them wherever they are. Raises StorageError."""
    return SINKS[name](out, IMAGE_SUFFIXES[image_format])
