"""The input files of a job, split into mini-batches as Azure splits them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from batch_infer.errors import TableError


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """Files that are passed to the script together, as absolute paths."""

    index: int
    files: tuple[str, ...]


def find_files(inputs: Sequence[Path]) -> list[str]:
    """Return the absolute paths of these files, and of the files directly in these folders.

    Raises TableError where one does not exist, there are no files, or two have the same name, since a batch endpoint
    has one input folder.
    """
    files = list(dict.fromkeys(path for entry in inputs for path in _list_files(entry)))
    if not files:
        shown = ", ".join(map(str, inputs))
        raise TableError(f"{shown}: there are no files; name the folder that holds them (subfolders are not read)")
    by_name: dict[str, str] = {}
    for file in files:
        other = by_name.setdefault(Path(file).name, file)
        if other != file:
            raise TableError(
                f"{other} and {file} have one name: images and ids follow from it, and a batch endpoint has one input"
                " folder; rename one of them"
            )
    return files


def _list_files(entry: Path) -> Iterator[str]:
    try:
        if entry.is_dir():
            paths = sorted(path for path in entry.iterdir() if path.is_file())
        elif entry.is_file():
            paths = [entry]
        else:
            raise TableError(f"{entry}: there is no such file or folder")
    except OSError as error:
        raise TableError(f"{entry}: {error.strerror}") from error
    yield from (os.path.abspath(path) for path in paths)  # noqa: PTH100  # a link keeps its own name, as in Azure


def split_files(files: Sequence[str], size: int) -> list[MiniBatch]:
    """Return mini-batches of `size` files; the last one may be smaller."""
    starts = range(0, len(files), size)
    return [MiniBatch(index, tuple(files[start : start + size])) for index, start in enumerate(starts)]
