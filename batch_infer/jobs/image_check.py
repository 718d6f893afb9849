"""Compare the image files of OUT with the results that name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeAlias

from batch_infer.jobs.problems import IMAGE_COLUMNS, ImageRecords, Key, Problems
from batch_infer.manifest import Manifest, read_part_in_batches
from batch_infer.sinks import is_image_path, original_path
from batch_infer.store import Store, is_temporary, prefetch

BATCH = 512
"""Maximum number of images to hash together."""
_Image: TypeAlias = tuple[str, str, int, "str | None", "int | None"]
"""Path, id, image index, SHA-256 and size of an image by its result."""


@dataclass(frozen=True, slots=True)
class ImageChecks:
    """What to check. `is_quick` compares only sizes, and `may_be_active` ignores the temporary files of workers."""

    is_quick: bool = False
    may_be_active: bool = False


def check_images(
    records: ImageRecords,
    store: Store,
    problems: Problems,
    checks: ImageChecks = ImageChecks(),
    report: Callable[[int], object] = lambda _: None,
) -> int:
    """Add the problems of all images to `problems`, and return the number of images that were read.

    Two streams sorted by path are merged, the results' and the storage's, so memory does not grow with the number of
    images. Each folder is listed once and each image read once. `report` receives the number of images checked so far.
    Raises StorageError.
    """
    checker = _Checker(records, store, problems, checks)
    for key in records.iterate_without_path():
        problems.add("missing_image", "its status is ok, but it has no image", key=key)
    waiting: list[tuple[_Image, int]] = []
    compared = read = 0
    for image, size in checker.iterate_present():
        if not checks.is_quick:
            waiting.append((image, size))
        compared += 1
        if compared % BATCH == 0:
            read += checker.hash(waiting)
            waiting.clear()
            report(compared)
    read += checker.hash(waiting)
    report(compared)
    return read


def find_damaged_images(store: Store, records: ImageRecords) -> None:
    """Add all images to empty records, with the faults of those whose files are missing or do not match their results.

    Raises StorageError, DamagedPartError, NewerPartError.
    """
    records.clear()  # after an error in an earlier call
    for part in prefetch(Manifest(store).parts()):
        for table in read_part_in_batches(part, IMAGE_COLUMNS):
            records.add(part.path, table)
    records.finish()
    check_images(records, store, Problems(records))


class _Checker:
    def __init__(self, records: ImageRecords, store: Store, problems: Problems, checks: ImageChecks) -> None:
        self._records, self._store, self._problems, self._checks = records, store, problems, checks

    def iterate_present(self) -> Iterator[tuple[_Image, int]]:
        """Yield the images that have a file of the right size, and add all others to the problems."""
        files = self._store.list_image_files()
        file = next(files, None)
        path, size, is_used = None, None, False
        for image in self._records.iterate_images():
            if path != image[0]:  # several results of an edited manifest may name one file
                while file is not None and file[0] < image[0]:
                    self._add_orphan(file[0])
                    file = next(files, None)
                path, size, is_used = image[0], None, False
                if file is not None and file[0] == path:
                    size, is_used, file = file[1], True, next(files, None)
            if self._has_right_size(image, size, exists=is_used) and size is not None:
                yield image, size
        while file is not None:
            self._add_orphan(file[0])
            file = next(files, None)

    def hash(self, images: list[tuple[_Image, int]]) -> int:
        """Compare the SHA-256 of images with their results, and return how many images were read."""
        digests = self._store.hash_images([(image[0], size) for image, size in images])
        for ((path, name, index, expected, _), _), digest in zip(images, digests, strict=True):
            if digest is None:
                self._problems.add("wrong_image", "it cannot be read", key=(name, index), path=path)
            elif digest != expected:
                detail = f"its SHA-256 is {digest} instead of {expected}"
                self._problems.add("wrong_image", detail, key=(name, index), path=path)
        return len(images)

    def _has_right_size(self, image: _Image, size: int | None, *, exists: bool) -> bool:
        path, name, index, _, expected = image
        key: Key = (name, index)
        if size == expected and size is not None:
            return True
        if not is_image_path(path):
            self._problems.add("missing_image", "its path is outside images/ and quarantine/", key=key, path=path)
        elif size is None:
            detail = "it is not a file" if exists else "there is no such file"
            self._problems.add("missing_image", detail, key=key, path=path)
        elif expected is None:
            self._problems.add("wrong_image", "its result names no size", key=key, path=path)
        else:
            detail = f"it has {size:,} bytes instead of {expected:,}"
            self._problems.add("truncated_image" if size < expected else "wrong_image", detail, key=key, path=path)
        return False

    def _add_orphan(self, path: str) -> None:
        """Add a file that no result names, unless it may be the image of a row that is reported as missing."""
        is_leftover = is_temporary(PurePosixPath(path).name) or original_path(path) is not None
        if (is_leftover and self._checks.may_be_active) or self._records.is_expected(path):
            return
        detail = "a killed process left it; the next run removes it" if is_leftover else "no result names it"
        self._problems.add("orphan_image", detail, path=path)
