"""What every sink can do, and the one place that creates them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from batch_infer.records import PromptRequest, StoredImage
from batch_infer.settings import IMAGE_SUFFIXES, ImageFormat
from batch_infer.sinks.folder import FolderSink
from batch_infer.sinks.names import Collisions, ImageIndex
from batch_infer.store import PinnedFolder


class Sink(Protocol):
    """Stores images in OUT. Paths are relative to OUT; those that lead out of it are treated as missing.

    The order that loses no image in a crash: `write`, `back_up` the images that will be replaced, `publish`, commit the
    manifest part, `remove` the backups. All methods raise StorageError, also where it is unknown what is stored.
    """

    def path_of(self, request: PromptRequest, *, quarantine: bool = False) -> str:
        """Return where to store a request's image. An image that is rendered again keeps its path."""

    def possible_paths(self, request: PromptRequest) -> set[str]:
        """Return every path that this and earlier versions may have given a request's image, and no other image."""

    def path_in(self, path: str, *, quarantine: bool) -> str:
        """Return the path of a stored image inside or outside the quarantine."""

    def folders_of(self, files: Iterable[str]) -> list[Path]:
        """Return the folders that may hold images of these source files, and the folders above them."""

    def collisions(self, index: ImageIndex) -> Collisions:
        """Return the names that committed images use."""

    def write(self, path: str, content: bytes) -> StoredImage:
        """Store an image under a temporary name."""

    def publish(self, paths: Iterable[str]) -> None:
        """Make written images durable under their own names, just before a manifest part names them.

        Not when they are written: a run that ends in between has then replaced no committed image.
        """

    def back_up(self, paths: Iterable[str]) -> None:
        """Rename committed images before `publish` replaces them. Missing images are skipped."""

    def backup_path(self, path: str) -> str:
        """Return the path that `back_up` gives an image in this process."""

    def restore(self, backup: str) -> None:
        """Undo the `back_up` of an image by any process, which died before the manifest had the new image."""

    def remove(self, path: str) -> None:
        """Remove an image, if it exists."""

    def has(self, path: str) -> bool:
        """Return whether there is an image at this path."""

    def read(self, path: str, length: int | None = None) -> bytes | None:
        """Return an image's bytes, or None where it is missing or, with `length`, not that long."""


SINKS: dict[str, Callable[[Path | PinnedFolder, str], Sink]] = {"folder": FolderSink}
"""Every sink by its name. They are created with OUT and the suffix of image files."""


def make_sink(out: Path | PinnedFolder, image_format: ImageFormat = "png", name: str = "folder") -> Sink:
    """Return the sink that stores the images of an OUT. Raises StorageError where OUT cannot be read."""
    return SINKS[name](out, IMAGE_SUFFIXES[image_format])
