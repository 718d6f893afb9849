"""The temporary folder for what must lie in a file to be read: fetched, piped in, or unpacked."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from batch_infer.store import temporary_folder


class Scratch:
    """A folder that is made when the first file wants a place in it."""

    def __init__(self) -> None:
        self._folder: TemporaryDirectory[str] | None = None
        self._given = 0

    def place(self) -> Path:
        """Return a path for one more file. Raises StorageError."""
        if self._folder is None:
            self._folder = temporary_folder()
        self._given += 1
        return Path(self._folder.name, f"{self._given:06d}")

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
