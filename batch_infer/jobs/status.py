"""How far a run is, told from what it has written: also while it goes on, and after it was killed."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from batch_infer.errors import StorageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.run_json import RunRecord, parse_record, require
from batch_infer.manifest import Manifest
from batch_infer.records import Status, now

STATUSES = get_args(Status)


@dataclass(slots=True)
class Standing:
    """Results by status and those that are left, None while the tables are still being looked through.

    `state`: running, finished, stopped (run again to go on), rescoring where that has not come to its end, open where
    tables come to an endpoint one after the other, and the total is not known, or unknown: not finished,
    and this user may not look at OUT's lock. `holder` is the process that works in OUT.
    `is_stale`: results.* lack what was committed since they were written, because the run did not end in order.
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


@dataclass(frozen=True, slots=True)
class _Survey:
    """What a run found when it looked through the tables: `before` counts by status what it left as it was."""

    total: int
    pending: int
    before: Counter[str]
    rendering_since: datetime | None
    """When the first worker was ready; None before."""
    in_flight: int
    """Results that are under way together: a rate is given once so many are committed."""

    @classmethod
    def of(cls, record: RunRecord) -> _Survey | None:
        if (survey := record.survey) is None:
            return None
        before = Counter(survey.standing) + Counter(invalid=survey.invalid)
        return cls(survey.total, survey.pending, before, record.rendering_since, record.in_flight)


def status(out: Path) -> Standing:
    """Look at OUT, without holding it. Raises UsageError where it holds no run."""
    record = parse_record(outdir.known_run(out))
    try:
        holder = outdir.holder(out)
        state = "running" if holder else "stopped"
    except StorageError:  # not this user's to look at
        holder, state = None, "unknown"
    standing = Standing(state, holder, require(record.started_at, "started_at", out))
    is_open = not require(record.settings, "settings", out).table.tables
    summary = record.summary or (None if is_open else record.merged)
    if summary is not None and not holder:
        standing.counts = {name: getattr(summary, name) for name in STATUSES}
        standing.left = summary.left
        standing.images_per_second = summary.images_per_second
        standing.state = "stopped" if standing.left else "finished"
        standing.state = "rescoring" if record.rescoring else standing.state
        return standing
    if is_open:
        standing.state = "open"
    standing.is_stale = standing.state == "stopped"
    _count(standing, _Survey.of(record), Manifest(out), record.run_number)
    return standing


def _count(standing: Standing, survey: _Survey | None, manifest: Manifest, run: int | None) -> None:
    """Count what the run found done when it scanned the tables, and what it has committed since.

    All that the manifest holds is counted where the scan has not ended, and in an OUT of an earlier version, which
    has no run number.
    """
    before, since_run = (Counter[str](), 0) if survey is None or run is None else (survey.before, run)
    with manifest.index(since_run) as index:
        committed = index.statuses()
    counts = committed + before
    standing.counts = {name: counts[name] for name in STATUSES}
    if survey is None:
        return
    if run is None:
        standing.left = max(0, survey.total - counts.total())
        return
    standing.left = max(0, survey.pending - committed.total()) + survey.before["left"]
    if standing.holder:
        _rate(standing, survey, committed)


def _rate(standing: Standing, survey: _Survey, rendered: Counter[str]) -> None:
    """Divide by the time until now, so that a run that commits nothing more is seen to slow down."""
    committed = rendered.total()
    if survey.rendering_since is None or committed < max(1, survey.in_flight):
        return
    took = (now() - survey.rendering_since).total_seconds()
    if took > 0 and standing.left is not None:
        standing.images_per_second = round((rendered["ok"] + rendered["flagged"]) / took, 3)
        standing.seconds_left = round(standing.left * took / committed)
