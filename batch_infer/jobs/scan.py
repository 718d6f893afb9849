"""The survey: a walk over the tables before anything is rendered, which settles the rows that are invalid."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from batch_infer.carried import estimate_bytes
from batch_infer.jobs.job import Job
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.planning import Item, ManifestEntry, SkipRule
from batch_infer.records import ResultRow
from batch_infer.sinks import make_sink

INVALID_BATCH = 1024
INVALID_BYTES = 64 << 20
INVALID_SHOWN = 20
"""Invalid rows that are logged; the results name them all."""

log = logging.getLogger("batch_infer")


@dataclass(slots=True)
class ScanResult:
    """What a walk over the tables found before anything is rendered, in results (a row has one for each image).

    `done` results are left as they are, and `standing` counts them by status; under `left` stand those that have no
    result and are not to be rendered now either, since `retry` leaves them to `run`; `unsettled` are invalid rows that
    `retry` leaves to `run`. `sizes` (height, width) are those of the pending ones, and `reasons` says why they are
    pending; `changes` are the options that changed them.
    """

    total: int = 0
    done: int = 0
    invalid: int = 0
    pending: int = 0
    standing: dict[str, int] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    changes: str = ""
    unsettled: int = 0

    def add(self, item: Item, found: ManifestEntry | None, *, left_alone: bool) -> None:
        self.total += 1
        known = found is not None and found.fingerprint == item.fingerprint
        if isinstance(item, ResultRow):
            self.invalid += 1
            self.unsettled += left_alone and not known
        elif left_alone:
            self.done += 1
            status = found.status if found and known else "left"
            self.standing[status] = self.standing.get(status, 0) + 1
        else:
            self.pending += 1
            reason = reason_of(item, found)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            size = item.params.height, item.params.width
            if size not in self.sizes:
                self.sizes.append(size)

    @property
    def explanation(self) -> str:
        """Why results are pending: `1 new, 22 changed (num_inference_steps 8 -> 50)`."""
        return format_reasons(self.reasons, self.changes)


def reason_of(item: Item, found: ManifestEntry | None) -> str:
    """Say why a result is to be rendered, given what the manifest holds of it."""
    if found is None:
        return "new"
    if found.status == "invalid":
        return "invalid before"
    if found.fingerprint != item.fingerprint:
        return "changed"
    return "missing or damaged" if found.status == "ok" else f"{found.status} before"


def format_reasons(reasons: Mapping[str, int], changes: str) -> str:
    """Format the counts of `reason_of`, with the options that changed rows; empty where all rows are new."""
    if set(reasons) <= {"new"}:
        return ""
    cause = {"changed": f" ({changes})"} if changes else {}
    return ", ".join(f"{count:,} {reason}{cause.get(reason, '')}" for reason, count in reasons.items())


def scan_tables(
    job: Job, index: ManifestIndex, leaves_alone: SkipRule, changes: str = "", *, writes: bool = True
) -> ScanResult:
    """Count what there is to do, and commit the invalid rows: they wait for no device. Raises StorageError.

    `changes`: the options by which rows changed, in words. Without `writes` invalid rows are left to `commit_invalid`.
    """
    survey = ScanResult(changes=changes)
    invalid = _Invalid(job)
    count = 0
    for item in job.items(index):
        found = index.find(item.key)
        left_alone = leaves_alone(item, found)
        survey.add(item, found, left_alone=left_alone)
        if isinstance(item, ResultRow) and not left_alone:
            count += 1
            level = logging.WARNING if count <= INVALID_SHOWN else logging.DEBUG
            log.log(level, "%s (%s): %s", item.source, item.id, item.error)
            if writes:
                invalid.add(item, found)
    invalid.commit()
    for remark in job.tables.remarks:
        log.warning("%s", remark)
    if survey.invalid > min(count, INVALID_SHOWN):
        log.warning("invalid in all: %d; results.parquet names each with its error", survey.invalid)
    return survey


def commit_invalid(job: Job) -> None:
    """Commit the invalid rows of an OUT that held no results when its tables were scanned. Raises StorageError."""
    invalid = _Invalid(job)
    with ManifestIndex(()) as index:
        for item in job.items(index):
            if isinstance(item, ResultRow):
                invalid.add(item, None)
    invalid.commit()


class _Invalid:
    """Invalid rows on their way to the manifest, and the images that they had while they were valid."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._manifest, self._sink = Manifest(job.settings.out, job.number), make_sink(job.settings.out)
        self._rows: list[ResultRow] = []
        self._size = 0
        self._obsolete: list[str] = []

    def add(self, row: ResultRow, found: ManifestEntry | None) -> None:
        self._rows.append(replace(row, attempt=found.attempt + 1 if found else 1, worker="table"))
        if found and found.path:
            self._obsolete.append(found.path)
        self._size += estimate_bytes(row.carried.values())
        if len(self._rows) == INVALID_BATCH or self._size > INVALID_BYTES:
            self.commit()

    def commit(self) -> None:
        if self._rows:
            self._manifest.commit(self._rows, self._job.tables.carried)
        for path in self._obsolete:
            self._sink.remove(path)
        self._size = 0
        self._rows.clear()
        self._obsolete.clear()
