"""Mark the results of faulty images as failed, so that they are rendered again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa

from batch_infer.carried import to_values
from batch_infer.jobs.checksums import remove_root_digest
from batch_infer.jobs.merge import make_results_schema
from batch_infer.jobs.verify.image_records import ImageRecords
from batch_infer.manifest import SCHEMA, Manifest, ManifestIndex, read_carried_fields, to_arguments
from batch_infer.records import ResultRow, Verdict, utc_now
from batch_infer.stopping import GRACE_SECONDS, deferred
from batch_infer.store import Store, StoredFile
from batch_infer.worker import format_worker_name, with_image, with_verdict

BATCH = 256
"""Maximum number of rows of a part."""


def mark_failed(store: Store, record: Mapping[str, Any], parts: Sequence[StoredFile], images: ImageRecords) -> int:
    """Commit the images with faults as failed, with one more attempt, and return their number.

    No image is changed or removed. `parts` are the readable parts of a locked OUT, and `record` is its run.json, which
    loses the root digest until results.* are written again. Raises StorageError, DamagedPartError.
    """
    faults, count = images.iterate_faults(), 0
    schema = make_results_schema(pa.schema(read_carried_fields(part)) for part in parts)
    carried = pa.schema([column for column in schema if column.name not in SCHEMA.names])
    manifest = Manifest(store, record.get("run_number") or 0)
    with ManifestIndex(parts) as index:
        while batch := list(islice(faults, BATCH)):
            if not count:
                remove_root_digest(store, record)
            rows = list(_make_failed(batch, index, schema))
            with deferred(GRACE_SECONDS):
                manifest.commit(rows, carried)
            count += len(rows)
    return count


def _make_failed(
    faults: Sequence[tuple[str, int, str, str]], index: ManifestIndex, schema: pa.Schema
) -> Iterator[ResultRow]:
    """Yield the failed results that replace those with faults."""
    matches = [(index.find((name, number)), f"{kind}: {detail}") for name, number, kind, detail in faults]
    known = [(committed, detail) for committed, detail in matches if committed is not None]
    table = index.read_results([committed for committed, _ in known], schema)
    rows = to_arguments(table.select(SCHEMA.names))
    names = [name for name in schema.names if name not in SCHEMA.names]
    cells = zip(*(to_values(table[name]) for name in names), strict=True) if names else [()] * len(rows)
    for row, row_cells, (_, detail) in zip(rows, cells, known, strict=True):
        result = ResultRow(**row, carried=dict(zip(names, row_cells, strict=True)))
        yield replace(
            with_image(with_verdict(result, Verdict()), None),
            status="failed",
            error=f"verify rejected its image ({detail})",
            attempt=result.attempt + 1,
            worker=format_worker_name(0),
            finished_at=utc_now(),
        )
