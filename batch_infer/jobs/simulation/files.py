"""The files of a job, cut into mini-batches as Azure cuts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from batch_infer.errors import TableError
from batch_infer.jobs.simulation.messages import MiniBatch


def find_files(inputs: Sequence[Path]) -> list[str]:
    """Absolute paths of files that are named, and of those directly in a folder that is. Raises TableError."""
    found = list(dict.fromkeys(path for entry in inputs for path in _files_of(entry)))
    if not found:
        told = ", ".join(map(str, inputs))
        raise TableError(f"{told}: there are no files; name the folder that holds them, for folders in it are not read")
    return found


def _files_of(entry: Path) -> Iterator[str]:
    try:
        if not entry.is_dir():
            if not entry.is_file():
                raise TableError(f"{entry}: there is no such file or folder")
            yield os.path.abspath(entry)  # noqa: PTH100  # a link keeps its own name, as the script may ask for it
            return
        paths = sorted(path for path in entry.iterdir() if path.is_file())
    except OSError as error:
        raise TableError(f"{entry}: {error.strerror}") from error
    yield from (os.path.abspath(path) for path in paths)  # noqa: PTH100


def cut(files: Sequence[str], size: int) -> list[MiniBatch]:
    """Mini-batches of so many files."""
    starts = range(0, len(files), size)
    return [MiniBatch(index, tuple(files[start : start + size])) for index, start in enumerate(starts)]
