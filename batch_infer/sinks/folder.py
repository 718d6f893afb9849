"""Images as files under OUT, each whole or not there at all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from batch_infer.atomic import sync, temporary_of
from batch_infer.errors import StorageError
from batch_infer.records import PromptRequest, StoredImage

ROWS_PER_FOLDER = 1000
_PLAIN = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]{0,78}[a-z0-9_-])?")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


class FolderSink:
    """`images/STEM-NNNNN/ID-K.png` under OUT, flagged images that are set apart under `quarantine/`."""

    def __init__(self, out: Path, suffix: str = "") -> None:
        self._out, self._suffix = out, suffix

    def path_of(self, request: PromptRequest, *, quarantine: bool = False) -> str:
        """Where a request's image stands, relative to OUT."""
        folder = f"{plain_name(request.source.stem)}-{request.source.row // ROWS_PER_FOLDER:05d}"
        name = f"{plain_name(request.id)}-{request.image_index}{self._suffix}"
        return f"{'quarantine' if quarantine else 'images'}/{folder}/{name}"

    def write(self, path: str, content: bytes) -> StoredImage:
        """Store a file under a temporary name, until `settle` gives it its own. Raises StorageError."""
        target = self._out / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary_of(target).write_bytes(content)
        except OSError as error:
            raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
        return StoredImage(path, hashlib.sha256(content).hexdigest(), len(content))

    def settle(self, paths: Iterable[str]) -> None:
        """Have the disk hold these files and give them their names, just before a manifest part speaks of them.

        Not when they are written: a run that ends in between has then replaced no image that the manifest stands by.
        Raises StorageError.
        """
        for path in paths:
            target = self._out / path
            try:
                sync(temporary_of(target))
                temporary_of(target).replace(target)
            except OSError as error:
                raise StorageError(f"cannot write {target}: {error.strerror or error}") from error

    def remove(self, path: str) -> None:
        """Remove an image by its path relative to OUT; a path that leads out of it is none of ours."""
        relative = PurePosixPath(path)
        if relative.is_absolute() or ".." in relative.parts:
            return
        target = self._out / relative
        # images/ itself may be a link to a larger disk; a link within it is not ours to follow.
        if target.parent.resolve().is_relative_to((self._out / relative.parts[0]).resolve()):
            target.unlink(missing_ok=True)


def plain_name(text: str) -> str:
    """A file name for any text, on any file system, such that no two texts share one.

    Lower-case letters, digits, `_`, `.` and `-` stand for themselves. Whatever else there is (capitals too: some
    file systems do not tell them apart) becomes `_`, and `~` with a digest of the whole text keeps names apart.
    """
    if _PLAIN.fullmatch(text) and not _DEVICE.fullmatch(text):
        return text
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:60]
    return f"{readable}~{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
