"""Compare the image files of OUT with the results that name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from batch_infer.jobs.verify.image_records import IMAGE_COLUMNS, ImageRecord, ImageRecords
from batch_infer.jobs.verify.problems import Kind, Problems
from batch_infer.manifest import Manifest, read_part_in_batches
from batch_infer.sinks import is_image_path, make_sink, original_path, parse_member
from batch_infer.store import NOT_A_FILE, Store, is_temporary, prefetch

BATCH = 512
"""Maximum number of images to hash together."""


@dataclass(frozen=True, slots=True)
class ImageCheckOptions:
    """What to check.

    `is_quick` compares only sizes, and `may_be_active` ignores the temporary files of workers. With
    `has_unreadable_parts`, a file that no result names may be the image of a result in one of these parts.
    """

    is_quick: bool = False
    may_be_active: bool = False
    has_unreadable_parts: bool = False


def check_images(
    records: ImageRecords,
    store: Store,
    problems: Problems,
    options: ImageCheckOptions = ImageCheckOptions(),
    on_progress: Callable[[int], object] = lambda _: None,
) -> int:
    """Add the problems of all images to `problems`, and return the number of images that were read.

    Merge two streams sorted by path, of results and of stored files, so that memory does not grow with the number of
    images. Each folder is listed once and each image read once. `on_progress` receives the number of images checked so
    far. Raises StorageError.
    """
    verifier = _ImageVerifier(records, store, problems, options)
    for key in records.iterate_without_path():
        problems.add("missing_image", "its status is ok, but it has no image", key=key)
    waiting: list[ImageRecord] = []
    compared_count = read_count = 0
    for image in verifier.iterate_present():
        if not options.is_quick:
            waiting.append(image)
        compared_count += 1
        if compared_count % BATCH == 0:
            read_count += verifier.hash(waiting)
            waiting.clear()
            on_progress(compared_count)
    read_count += verifier.hash(waiting)
    on_progress(compared_count)
    return read_count


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


class _ImageVerifier:
    """Compares files with results, and adds what is wrong to the problems."""

    def __init__(self, records: ImageRecords, store: Store, problems: Problems, options: ImageCheckOptions) -> None:
        self._records, self._sink, self._problems, self._options = records, make_sink(store), problems, options

    def iterate_present(self) -> Iterator[ImageRecord]:
        """Yield the images that have a file, of the right size if it is known, and add all others to the problems."""
        files = self._sink.list_images(needs_sizes=self._options.is_quick)
        file = next(files, None)
        path, size, exists = None, None, False
        for image in self._records.iterate_images():
            if path != image.path:  # several results of an edited manifest may name one file
                while file is not None and file[0] < image.path:
                    self._add_orphan(file[0])
                    file = next(files, None)
                path, size, exists = image.path, None, False
                if file is not None and file[0] == path:
                    size, exists, file = file[1], True, next(files, None)
            if self._check_size(image, size, exists=exists):
                yield image
        while file is not None:
            self._add_orphan(file[0])
            file = next(files, None)

    def hash(self, images: list[ImageRecord]) -> int:
        """Compare the SHA-256 of images with their results, and return how many images were read."""
        digests = self._sink.hash([(image.path, image.byte_count or 0) for image in images])
        for image, digest in zip(images, digests, strict=True):
            if digest is None:
                self._add("wrong_image", image, "it cannot be read")
            elif digest.size != image.byte_count:
                self._add_wrong_size(image, digest.size)
            elif digest.sha256 != image.sha256:
                self._add("wrong_image", image, f"its SHA-256 is {digest.sha256} instead of {image.sha256}")
        return len(images)

    def _check_size(self, image: ImageRecord, size: int | None, *, exists: bool) -> bool:
        """Return whether an image has a file, of the right size unless the size is None. Otherwise add a problem."""
        expected = image.byte_count
        is_known = expected is not None and expected >= 0
        if exists and is_known and size in (None, expected):
            return True
        if not exists and parse_member(image.path):
            self._add("missing_image", image, "its shard is missing or damaged, or does not contain it")
        elif not exists and not is_image_path(image.path):
            self._add("missing_image", image, "its path is outside images/, quarantine/ and shards/")
        elif not exists:
            self._add("missing_image", image, "there is no such file")
        elif size == NOT_A_FILE:
            self._add("missing_image", image, "it is not a file")
        elif is_known and size is not None:
            self._add_wrong_size(image, size)
        else:
            self._add("wrong_image", image, "its result names no size")
        return False

    def _add_wrong_size(self, image: ImageRecord, size: int) -> None:
        expected = image.byte_count or 0
        if size < expected:
            self._add("truncated_image", image, f"it has {size:,} bytes instead of {expected:,}")
        else:  # it is read only up to the first byte too many
            self._add("wrong_image", image, f"it has more than {expected:,} bytes")

    def _add(self, kind: Kind, image: ImageRecord, detail: str) -> None:
        self._problems.add(kind, detail, key=(image.id, image.image_index), path=image.path)

    def _add_orphan(self, path: str) -> None:
        """Add a file that no result names, unless it may be the image of a row that is reported as missing."""
        is_leftover = is_temporary(PurePosixPath(path).name) or original_path(path) is not None
        if (is_leftover and self._options.may_be_active) or self._records.is_expected(path):
            return
        detail = "a killed process left it; the next run removes it" if is_leftover else "no result names it"
        if self._options.has_unreadable_parts:
            detail += ", unless it is a result in a part that cannot be read"
        self._problems.add("orphan_image", detail, path=path)
