"""Define the interface of sinks, and create sinks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from batch_infer.records import PromptRequest, StoredImage
from batch_infer.settings import IMAGE_SUFFIXES, ImageFormat
from batch_infer.sinks.folder import FolderSink
from batch_infer.sinks.names import Collisions, ImageIndex
from batch_infer.store import Out


class Sink(Protocol):
    """Stores each image as a file in OUT. Paths of type str are relative to OUT.

    Images are in IMAGE_FOLDERS: in quarantine/ if `quarantine` is set, otherwise in images/. Paths elsewhere count as
    missing. The file name of a backup is a `store.unique_name` with BACKUP_PREFIX, so that recovery finds the backups
    of killed runs and their `original_path`. A crash loses no image if the steps are in this order: `write`, `back_up`
    the images to replace, `publish`, commit the manifest part, `remove` the backups. All methods may raise
    StorageError, for example if they cannot determine whether an image exists.
    """

    def path_of(self, request: PromptRequest, *, quarantine: bool = False) -> str:
        """Return the path for a request's image. Rendering an image again keeps its path."""

    def possible_paths(self, request: PromptRequest) -> set[str]:
        """Return every path that this or an earlier version may have used only for this request's image."""

    def path_in(self, path: str, *, quarantine: bool) -> str:
        """Return an image's path, changed to be in quarantine/ if `quarantine` is set, otherwise in images/."""

    def folders_of(self, files: Iterable[str]) -> list[str]:
        """Return images/, quarantine/ and those of their subfolders that may contain images from these source files."""

    def collisions(self, index: ImageIndex) -> Collisions:
        """Return an object that finds collisions with the names of committed images."""

    def write(self, path: str, content: bytes) -> StoredImage:
        """Write an image under a temporary name."""

    def publish(self, paths: Iterable[str]) -> None:
        """Make written images durable under their final names, just before a manifest part lists them.

        A run that ends between `write` and `publish` replaces no committed image.
        """

    def back_up(self, paths: Iterable[str]) -> None:
        """Keep committed images under other names before `publish` replaces them. Missing images are skipped."""

    def backup_path(self, path: str) -> str:
        """Return the path under which `back_up` keeps an image in this process."""

    def restore(self, backup: str) -> None:
        """Restore a backup. Any process may have written it and died before it committed the new image."""

    def remove(self, *paths: str) -> None:
        """Remove those of these images that exist."""

    def has(self, path: str) -> bool:
        """Return whether an image exists at this path."""

    def list_images(self, folder: str) -> set[str]:
        """Return the file names of the images in a folder of OUT, which is that of an image's path."""

    def read(self, path: str, length: int | None = None) -> bytes | None:
        """Return an image's bytes, or None if it is missing or its size differs from `length`, if given."""


SINKS: dict[str, Callable[[Out, str], Sink]] = {"folder": FolderSink}
"""Sinks by name. Each is created with OUT and the suffix of image files. `tests/test_sinks.py` tests all of them."""


def make_sink(out: Out, image_format: ImageFormat = "png", name: str = "folder") -> Sink:
    """Create a sink that stores images in OUT. Raises StorageError if OUT cannot be read."""
    return SINKS[name](out, IMAGE_SUFFIXES[image_format])
