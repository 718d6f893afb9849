"""How far a run is, told from what it has written: also while it goes on, and after it was killed."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from batch_infer.errors import StorageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.run_json import RunRecord, parse_record, require
from batch_infer.manifest import Manifest
from batch_infer.records import Status, utc_now

STATUSES = get_args(Status)


@dataclass(slots=True)
class RunStatus:
    """Results by status and those that are left, None while the tables are still being looked through.

    `state`: running, finished, stopped (run again to go on), rescoring where that has not come to its end, open where
    tables come to an endpoint one after the other, and the total is not known, or unknown: not finished,
    and this user may not look at OUT's lock. `holder` is the process that works in OUT.
    `is_stale`: results.* lack rows that were committed later, because the run was killed or had no time to merge.
    `images_per_second` counts the images rendered since the first worker of the run was ready, as Throughput does, and
    comes from the summary where the run has ended. `seconds_left` is set while a run is going.
    """

    state: str
    holder: str | None
    started_at: str
    counts: dict[str, int] = field(default_factory=dict)
    left: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    is_stale: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_status(out: Path) -> RunStatus:
    """Look at OUT, without holding it. Raises UsageError where it holds no run."""
    record = parse_record(outdir.known_run(out))
    try:
        holder = outdir.holder(out)
        state = "running" if holder else "stopped"
    except StorageError:  # not this user's to look at
        holder, state = None, "unknown"
    standing = RunStatus(state, holder, require(record.started_at, "started_at", out))
    is_open = not require(record.settings, "settings", out).table.tables
    summary = record.summary or (None if is_open else record.merged)
    if summary is not None:  # a run that works there now has not scanned its tables yet
        standing.counts = {name: getattr(summary, name) for name in STATUSES}
        standing.left = summary.left
        if not holder:
            standing.images_per_second = summary.images_per_second
            standing.state = "stopped" if standing.left else "finished"
    else:
        standing.state = "open" if is_open else standing.state
        standing.is_stale = standing.state == "stopped" and not record.rescoring
        _count(standing, record, Manifest(out))
    standing.state = "rescoring" if record.rescoring else standing.state
    return standing


def _count(standing: RunStatus, record: RunRecord, manifest: Manifest) -> None:
    """Count what the run found done when it scanned the tables, and what it has committed since.

    All that the manifest holds is counted where the scan has not ended, while images are rescored, which commits
    results of earlier runs again, and in an OUT of an earlier version, which has no run number.
    """
    survey, run = record.survey, record.run_number
    is_partial = survey is not None and run is not None and not record.rescoring
    with manifest.index(run if is_partial and run else 0) as index:
        committed = index.count_statuses()
    standing.counts = {name: committed[name] for name in STATUSES}
    if survey is None:
        return
    if not is_partial:
        standing.left = max(0, survey.total - committed.total())
        return
    rendered = committed - Counter(invalid=committed["invalid"])
    counts = Counter(survey.standing) + Counter(invalid=survey.invalid) + rendered
    standing.counts = {name: counts[name] for name in STATUSES}
    standing.left = max(0, survey.pending - rendered.total()) + counts["left"]
    if standing.holder:
        _rate(standing, record, rendered)


def _rate(standing: RunStatus, record: RunRecord, rendered: Counter[str]) -> None:
    """Divide by the time until now, so that a run that commits nothing more is seen to slow down."""
    committed = rendered.total()
    if record.rendering_since is None or committed < max(1, record.in_flight):
        return
    took = (utc_now() - record.rendering_since).total_seconds()
    if took > 0 and standing.left is not None:
        standing.images_per_second = round((rendered["ok"] + rendered["flagged"]) / took, 3)
        standing.seconds_left = round(standing.left * took / committed)
