"""Compare the image files of OUT with the results that name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeAlias

from batch_infer.jobs.verify.problems import IMAGE_COLUMNS, ImageRecords, Problems
from batch_infer.manifest import Manifest, read_part_in_batches
from batch_infer.sinks import is_image_path, original_path
from batch_infer.store import NOT_A_FILE, Store, is_temporary, prefetch

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
    waiting: list[_Image] = []
    compared = read = 0
    for image in checker.iterate_present():
        if not checks.is_quick:
            waiting.append(image)
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

    def iterate_present(self) -> Iterator[_Image]:
        """Yield the images that have a file, of the right size if it is known, and add all others to the problems."""
        files = self._store.list_image_files(needs_sizes=self._checks.is_quick)
        file = next(files, None)
        path, size, exists = None, None, False
        for image in self._records.iterate_images():
            if path != image[0]:  # several results of an edited manifest may name one file
                while file is not None and file[0] < image[0]:
                    self._add_orphan(file[0])
                    file = next(files, None)
                path, size, exists = image[0], None, False
                if file is not None and file[0] == path:
                    size, exists, file = file[1], True, next(files, None)
            if self._may_be_whole(image, size, exists=exists):
                yield image
        while file is not None:
            self._add_orphan(file[0])
            file = next(files, None)

    def hash(self, images: list[_Image]) -> int:
        """Compare the SHA-256 of images with their results, and return how many images were read."""
        digests = self._store.hash_images([(image[0], image[4] or 0) for image in images])
        for image, digest in zip(images, digests, strict=True):
            path, name, index, expected, size = image
            if digest is None:
                self._problems.add("wrong_image", "it cannot be read", key=(name, index), path=path)
            elif digest.size != size:
                self._add_wrong_size(image, digest.size)
            elif digest.sha256 != expected:
                detail = f"its SHA-256 is {digest.sha256} instead of {expected}"
                self._problems.add("wrong_image", detail, key=(name, index), path=path)
        return len(images)

    def _may_be_whole(self, image: _Image, size: int | None, *, exists: bool) -> bool:
        """Return whether an image has a file, of the right size unless the size is None. Otherwise add a problem."""
        path, name, index, _, expected = image
        is_known = expected is not None and expected >= 0
        if exists and is_known and size in (None, expected):
            return True
        if not exists and not is_image_path(path):
            self._add_missing(image, "its path is outside images/ and quarantine/")
        elif not exists:
            self._add_missing(image, "there is no such file")
        elif size == NOT_A_FILE:
            self._add_missing(image, "it is not a file")
        elif is_known and size is not None:
            self._add_wrong_size(image, size)
        else:
            self._problems.add("wrong_image", "its result names no size", key=(name, index), path=path)
        return False

    def _add_missing(self, image: _Image, detail: str) -> None:
        path, name, index, *_ = image
        self._problems.add("missing_image", detail, key=(name, index), path=path)

    def _add_wrong_size(self, image: _Image, size: int) -> None:
        path, name, index, _, expected = image
        is_truncated = size < (expected or 0)
        # An image that is too large is read only up to the first byte too many.
        detail = (
            f"it has {size:,} bytes instead of {expected:,}" if is_truncated else f"it has more than {expected:,} bytes"
        )
        self._problems.add("truncated_image" if is_truncated else "wrong_image", detail, key=(name, index), path=path)

    def _add_orphan(self, path: str) -> None:
        """Add a file that no result names, unless it may be the image of a row that is reported as missing."""
        is_leftover = is_temporary(PurePosixPath(path).name) or original_path(path) is not None
        if (is_leftover and self._checks.may_be_active) or self._records.is_expected(path):
            return
        detail = "a killed process left it; the next run removes it" if is_leftover else "no result names it"
        self._problems.add("orphan_image", detail, path=path)
