"""Recognise a run that has nothing to do without reading the rows of its tables."""

from __future__ import annotations

import logging

import msgspec

from batch_infer.jobs.checksums import check_checksums
from batch_infer.jobs.description import without_keys
from batch_infer.jobs.job import Job
from batch_infer.jobs.out import RESULTS
from batch_infer.jobs.run_json import ended_cleanly, parse_record
from batch_infer.jobs.scan import ScanResult
from batch_infer.jobs.summary import Counts
from batch_infer.settings import METADATA

log = logging.getLogger("batch_infer")


def recognise_finished_run(job: Job, tables_digest: str | None) -> tuple[ScanResult, Counts] | None:
    """Return the scan result and the counts of a run that has nothing to do, or None if the tables must be read.

    There is nothing to do if the last run in OUT read the same tables by the same rules and ended with an image or a
    blocked prompt for each result, it wrote the same formats, and the manifest parts and results.* are still the files
    that it wrote, by their SHA-256. Reading ten million rows takes half an hour; hashing these files takes seconds.

    `tables_digest` is that of the job's tables. Raises StorageError.
    """
    if job.earlier is None or tables_digest is None or not ended_cleanly(job.earlier):
        return None
    earlier = parse_record(job.earlier)
    counts = msgspec.convert(job.earlier["summary"], Counts)
    if earlier.survey is None or earlier.survey.tables_digest != tables_digest or not earlier.settings:
        return None
    if counts.remaining or counts.failed or counts.invalid or counts.results != earlier.survey.total:
        return None
    output = job.settings.output
    if output.sign_key is not None or without_keys(output) != without_keys(earlier.settings.output):
        return None
    check = check_checksums(job.store, job.earlier)
    results = check.matching.intersection(RESULTS)
    # An earlier version wrote no metadata.parquet, and that of another program is kept.
    if not check.is_proof or results - {METADATA} != set(output.results_files) - {METADATA}:
        return None
    log.debug("the tables, the manifest and the results have not changed since the last run, so no rows are read")
    skipped = {name: count for name in ("ok", "flagged", "blocked") if (count := getattr(counts, name))}
    return ScanResult(total=counts.results, finished=counts.results, skipped=skipped), counts
