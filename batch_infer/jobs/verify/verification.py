"""Check that every row of a run is accounted for, and that every file in OUT is whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from batch_infer.errors import BatchInferError, DamagedPartError, LockedError, NewerPartError, StorageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.checksums import ROOT_DIGEST, ChecksumCheck, check_checksums, find_results, refuse_changed_parts
from batch_infer.jobs.merge import merge_results
from batch_infer.jobs.progress import Progress
from batch_infer.jobs.run_json import read_settings
from batch_infer.jobs.signing import read_public_key
from batch_infer.jobs.summary import JsonStruct
from batch_infer.jobs.verify.image_check import ImageCheckOptions, check_images
from batch_infer.jobs.verify.image_records import IMAGE_COLUMNS, ImageRecords
from batch_infer.jobs.verify.problems import Problem, Problems
from batch_infer.jobs.verify.repair import mark_failed
from batch_infer.jobs.verify.reproduce import Sample, choose_sample, reproduce
from batch_infer.jobs.verify.results_check import RESULTS_PARQUET
from batch_infer.jobs.verify.row_check import RowVerifier, open_recorded_tables
from batch_infer.manifest import Manifest, ManifestIndex, read_part_in_batches
from batch_infer.settings import RESULTS_FILES
from batch_infer.store import Out, Store, StoredFile, open_store, prefetch, to_absolute
from batch_infer.terminal import quote_command

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How to verify.

    `tables` replace the run's tables if they were moved. `is_quick` compares only the names and sizes of images.
    `public_key` is the path of the key that must have signed SHA256SUMS. `marks_failed` marks images that are missing
    or damaged or were not reproduced as failed, so that the next run renders them again. `sample_size` is the number of
    results to render again, which `sample_seed` chooses.
    """

    tables: tuple[str, ...] = ()
    is_quick: bool = False
    public_key: str | None = None
    marks_failed: bool = False
    sample_size: int = 0
    sample_seed: int = 0


class Verification(JsonStruct):
    """What `verify` found. `counts` counts all problems by kind, and `problems` lists the first of them.

    `statuses` counts results by status, also those of rows that have left the tables. `images` is the number of images
    that results name, `checked` that of images whose bytes were read, and `rendered_again` that of images that were
    rendered again to compare them, which `sample` describes. `marked_count` is the number of results that were marked
    as failed. `root_digest` is that of run.json, or None if SHA256SUMS has another one or results were marked.
    `is_signed` is whether the public key's signature of SHA256SUMS is valid.
    """

    rows: int = 0
    statuses: dict[str, int] = {}
    images: int = 0
    checked: int = 0
    rendered_again: int = 0
    problems: list[Problem] = []
    counts: dict[str, int] = {}
    marked_count: int = 0
    sample: Sample | None = None
    root_digest: str | None = None
    is_signed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the keys of --json, which has `sample` only if images were rendered again."""
        values = super().as_dict()
        del values["marked_count"], values["is_signed"]
        if self.sample is None:
            del values["sample"]
        else:
            del values["sample"]["problems"]  # among the other problems
        return values


def verify_run(
    out: Out,
    options: VerifyOptions = VerifyOptions(),
    on_progress: Callable[[int, int], object] = lambda _, __: None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Verification:
    """Check parts, rows, results.* and images of OUT, and return the problems. Without `marks_failed`, write nothing.

    Rows and results.* are not compared one by one if the checksums prove them: run.json records the digest of
    SHA256SUMS, all listed files match, the run left no rows unfinished, and the tables have the recorded digest.
    results.* are then the bytes that the run wrote after it had accounted for every row of these tables.

    `on_progress` receives the number of images checked so far and their total. With `progress`, a sample is rendered
    again if `options` say so. Raises UsageError, for example if OUT contains no run or its model has changed,
    LockedError if another command uses OUT, ServiceError, StorageError, and StoppedError if `stop` ends the rendering.
    """
    unlocked_store = open_store(to_absolute(out))
    if options.public_key is not None:
        read_public_key(options.public_key)
    outdir.read_existing_run(unlocked_store)  # before OUT is locked, which would create it
    _refuse_while_active(unlocked_store)
    with outdir.locked(unlocked_store) if options.marks_failed else nullcontext(unlocked_store) as store:
        record = outdir.read_existing_run(store)
        outdir.refuse_while_rescoring(store.location, record)
        with ImageRecords() as images:
            verifier = _Verifier(store, record, options, images)
            verification = verifier.verify(on_progress)
            if options.sample_size and progress is not None:
                verifier.render_sample(verification, progress, stop)
            if options.marks_failed:
                _refuse_without_images(store, verification)
                refuse_changed_parts(store, record)
                verification.marked_count = mark_failed(store, record, verifier.parts, images)
                if verification.marked_count:
                    verification.root_digest = None
        if not options.marks_failed:
            _refuse_while_active(store)
            if outdir.read_run(store) != record:
                raise LockedError(f"another command changed {store.location} in the meantime; run verify again")
    if verification.marked_count:
        _merge(unlocked_store)
    return verification


def _merge(store: Store) -> None:
    try:
        existing = set(find_results(store))
        formats = tuple(name for name, files in RESULTS_FILES.items() if existing.issuperset(files))
        merge_results(store, formats, base64=False)
    except BatchInferError as error:
        log.warning("results.* are not updated: %s", error)


def _refuse_without_images(store: Store, verification: Verification) -> None:
    """Raise StorageError if results name images and none exists: their disk may not be mounted."""
    if verification.images and verification.counts.get("missing_image") == verification.images:
        retry = quote_command("retry", store.location, "--status", "missing")
        raise StorageError(
            f"none of the {verification.images:,} images of {store.location} exists, so --fix marks none: mount the "
            f"disk with the images, or render them again with {retry}"
        )


def _refuse_while_active(store: Store) -> None:
    """Raise LockedError if another command holds the lock of OUT, and so may be changing it."""
    try:
        holder = store.find_holder()
    except StorageError as error:
        log.warning("cannot tell whether another command is using %s: %s", store.location, error)
        return
    if holder is not None:
        raise LockedError(f"another command ({holder}) is using {store.location}; run verify again when it has ended")


class _Verifier:
    def __init__(self, store: Store, record: Mapping[str, Any], options: VerifyOptions, images: ImageRecords) -> None:
        self._store, self._record, self._options, self._images = store, record, options, images
        self._problems = Problems(images)
        self._settings = read_settings(record, store.location, options.tables)
        self.parts: list[StoredFile] = []
        """The parts that can be read."""

    def verify(self, on_progress: Callable[[int, int], object]) -> Verification:
        """Run all checks."""
        checksums = check_checksums(self._store, self._record, self._options.public_key)
        self._check_parts(checksums)
        moved = bool(self._options.tables)
        with open_recorded_tables(self._record, self._settings, moved=moved) as tables:
            verifier = RowVerifier(self._store, self._record, self._settings, self.parts, self._images, self._problems)
            row_count = verifier.check(checksums, tables, moved=moved)
        committed_rows, image_count = self._images.count()
        is_endpoint = not self._settings.table.tables
        checks = ImageCheckOptions(
            is_quick=self._options.is_quick,
            may_be_active=is_endpoint,
            has_unreadable_parts=len(self.parts) < len(Manifest(self._store).parts()),
        )
        checked = check_images(
            self._images, self._store, self._problems, checks, lambda done: on_progress(done, image_count)
        )
        return Verification(
            rows=committed_rows if row_count is None else row_count,
            images=image_count,
            checked=checked,
            problems=self._problems.listed,
            counts=dict(sorted(self._problems.counts.items())),
            statuses=self._images.count_statuses(),
            root_digest=self._record.get(ROOT_DIGEST) if checksums.has_root else None,
            is_signed=checksums.is_signed,
        )

    def render_sample(self, verification: Verification, progress: Progress, stop: Callable[[], bool]) -> None:
        """Render a sample of the results again, and add those that differ from the recorded ones."""
        with ManifestIndex(self.parts) as index:
            images = choose_sample(index, self._options.sample_size, self._options.sample_seed)
            sample = reproduce(self._store, self._record, index, images, progress, stop)
        for problem in sample.problems:
            key = problem.id, problem.image_index
            self._problems.add(problem.kind, problem.detail, key=key, path=problem.path)
        verification.sample, verification.rendered_again = sample, sample.rendered
        verification.counts = dict(sorted(self._problems.counts.items()))

    def _check_parts(self, checksums: ChecksumCheck) -> None:
        """Read every part, and add the faults of parts and their checksums.

        A part whose SHA-256 matches has been read for that, so only some of its columns are read again. All pages of
        other parts are.
        """
        faults = dict(checksums.problems)
        for part in prefetch(Manifest(self._store).parts()):
            columns = IMAGE_COLUMNS if part.path in checksums.matching else None
            try:
                for table in read_part_in_batches(part, columns):
                    self._images.add(part.path, table)
                self.parts.append(part)
            except DamagedPartError as damage:
                faults[part.path] = damage.reason
            except NewerPartError:
                faults[part.path] = "it was written by a newer batch-infer: upgrade batch-infer to verify it"
        self._images.finish()
        for path, reason in faults.items():
            if path != RESULTS_PARQUET:  # its rows are compared first
                self._problems.add("results_differ" if path in outdir.RESULTS else "damaged_part", reason, path=path)
        for name, index, path in self._images.iterate_repeated():
            detail = "the part has this result twice with the same attempt"
            self._problems.add("duplicate_row", detail, key=(name, index), path=path)
