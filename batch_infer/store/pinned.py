"""Detect that another folder has replaced a folder, for example after its disk was unmounted during a run."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from batch_infer.errors import StorageError
from batch_infer.store.atomic import TEMPORARY_PREFIX, unique_name
from batch_infer.store.paths import NOT_FOUND, path_exists, read_errors, write_errors


def marker_name() -> str:
    """Return the name of the file by which this process recognises a folder. `sweep` treats it as a temporary file."""
    return unique_name(TEMPORARY_PREFIX, "here")


@dataclass(frozen=True, slots=True)
class PinnedFolder:
    """Folder and its identity before the first write. Other processes of this machine can receive and check it too.

    `identity` is the device and inode, or None if there was no folder. `marker` is the name of an empty file in the
    folder that identifies it on mounts whose inode numbers change.
    """

    path: Path
    identity: tuple[int, int] | None
    marker: str | None = None

    @classmethod
    def pin(cls, path: Path | PinnedFolder) -> PinnedFolder:
        """Pin the folder at a path, with this process's marker if the folder contains it. Raises StorageError."""
        if isinstance(path, PinnedFolder):
            return path
        marker = marker_name()
        with read_errors(path):
            identity = _identity(path)
        return cls(path, identity, marker if path_exists(path / marker) else None)

    def with_marker(self, marker: str | None = None) -> PinnedFolder:
        """Write a marker, by default this process's, and return the folder with it. Raises StorageError."""
        name = marker or marker_name()
        with write_errors(self.path / name):
            (self.path / name).touch()
        return replace(self, marker=name)

    def remove_markers(self, inner: Iterable[str]) -> None:
        """Remove the marker from the folder and its subfolders `inner`. After an error, the next sweep removes it."""
        if self.marker is not None:
            for folder in (self.path, *(self.path / name for name in inner)):
                with suppress(OSError):
                    (folder / self.marker).unlink(missing_ok=True)

    def check(self) -> None:
        """Check that the path is still this folder. Raises StorageError.

        After an unmount, files would be written beneath the mount point and hidden by the next mount. FUSE mounts may
        return other inode numbers on each call, so an unexpected inode alone proves nothing. Only then does the marker
        decide, at the cost of one more call.
        """
        with read_errors(self.path):
            identity = _identity(self.path)
        if identity is not None and identity == self.identity:
            return
        if identity is None or self.marker is None or not path_exists(self.path / self.marker):
            raise StorageError(
                f"{self.path} has disappeared since the run began: it was removed, renamed, unmounted or"
                " replaced by another folder; put it back and run again to continue"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in NOT_FOUND:
            return None
        raise
    return status.st_dev, status.st_ino
