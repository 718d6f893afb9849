"""Temporary files: a temporary folder that is full or cannot be written is named, with the way out."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from batch_infer.errors import StorageError

BUFFER = 1 << 16
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors that only writing gives."""


def storage_fault(what: str, folder: str, reason: object) -> StorageError:
    """Return the error for a temporary file that cannot be written in a folder."""
    return StorageError(
        f"cannot write {what} in {folder}: {reason}; free some space there, or set TMPDIR to a folder on a larger disk"
    )


@contextmanager
def temporary_file_errors(*, reads: bool = False) -> Iterator[None]:
    """Re-raise OSError as StorageError that names the temporary folder and TMPDIR.

    With `reads`, the code inside also reads from elsewhere: only errors that reading never gives are re-raised.
    """
    try:
        yield
    except OSError as error:
        if reads and error.errno not in _NO_ROOM:
            raise
        raise storage_fault("a temporary file", _folder(), error.strerror or error) from error


def _folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # no folder at all can be written
        return os.environ.get("TMPDIR", os.sep + "tmp")


class _Raw(io.FileIO):
    """A file whose faults are those of the temporary folder. Closing its buffer raises them too."""

    def write(self, data: object, /) -> int:
        with temporary_file_errors():
            return super().write(data)  # type: ignore[arg-type]


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder. Raises StorageError."""
    with temporary_file_errors():
        return tempfile.TemporaryDirectory(prefix="batch-infer-", ignore_cleanup_errors=True)


def create_temporary(path: Path) -> BinaryIO:
    """Create a file in a temporary folder for writing. Creating, writing and closing it raise StorageError."""
    with temporary_file_errors():
        return io.BufferedWriter(_Raw(path, "w"), BUFFER)


def open_temporary_text() -> TextIO:
    """Open a nameless file for text that is written, then read. Opening, writing, closing it raise StorageError."""
    with temporary_file_errors(), tempfile.TemporaryFile(buffering=0) as file:
        raw = _Raw(os.dup(file.fileno()), "r+")
    return io.TextIOWrapper(io.BufferedRandom(raw, BUFFER), encoding="utf-8", newline="")
