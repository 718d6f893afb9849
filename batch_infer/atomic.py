"""Files that appear whole or not at all: a temporary name in the same folder, then a rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batch_infer.errors import StorageError

TEMPORARY = ".tmp-"


def temporary_of(path: Path) -> Path:
    """The name that a file bears in this process until it is whole."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Give a temporary path to write to, and put what was written there in the place of `path` when all went well.

    With `flush` the disk holds the bytes before the name changes, so that a power cut leaves the old file or the new
    one. Raises StorageError.
    """
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if flush:
                sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Have the disk hold a file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
