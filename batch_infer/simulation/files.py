"""The files of a job, cut into mini-batches as Azure cuts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from batch_infer.errors import TableError
from batch_infer.simulation.messages import MiniBatch


def find_files(inputs: Sequence[Path]) -> list[str]:
    """Absolute paths of files that are named, and of those directly in a folder that is. Raises TableError.

    No two may have one name, as in the one input folder that a batch endpoint has.
    """
    found = list(dict.fromkeys(path for entry in inputs for path in _files_of(entry)))
    if not found:
        told = ", ".join(map(str, inputs))
        raise TableError(f"{told}: there are no files; name the folder that holds them, for folders in it are not read")
    _refuse_two_of_one_name(found)
    return found


def _refuse_two_of_one_name(files: Sequence[str]) -> None:
    by_name: dict[str, str] = {}
    for file in files:
        other = by_name.setdefault(os.path.basename(file), file)  # noqa: PTH119
        if other != file:
            raise TableError(
                f"{other} and {file} have one name: images and ids follow from it, and a batch endpoint has one input"
                " folder; rename one of them"
            )


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
