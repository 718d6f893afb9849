"""How far a run is, told from what it has written: also while it goes on, and after it was killed."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from batch_infer.jobs import out as outdir
from batch_infer.jobs.run_json import RunRecord, parse_record, require
from batch_infer.manifest import Manifest
from batch_infer.records import Status, now
from batch_infer.settings import Compute

STATUSES = get_args(Status)


@dataclass(slots=True)
class Standing:
    """Results by status and those that are left, None while the tables are still being looked through.

    `state`: running, finished, stopped (run again to go on), rescoring where that has not come to its end, or open
    where tables come to an endpoint one after the other, and nobody knows of those that are left. `holder` is the
    process that works in OUT.
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Survey:
    """What a run found when it looked through the tables: `before` counts by status what it left as it was."""

    finished_at: datetime
    pending: int
    before: Counter[str]
    slots: int
    rendering_since: datetime | None
    """When the first worker was ready; None before."""
    has_start: bool
    """False of a run by an earlier version, which did not record `rendering_since`."""

    @classmethod
    def of(cls, record: RunRecord, compute: Compute, *, has_start: bool) -> _Survey | None:
        if (survey := record.survey) is None:
            return None
        slots = max([compute.slots, *(shape.slots for shape in compute.by_size)])
        before = Counter(survey.standing) + Counter(invalid=survey.invalid)
        return cls(survey.finished_at, survey.pending, before, slots, record.rendering_since, has_start)


def status(out: Path) -> Standing:
    """Look at OUT, without holding it. Raises UsageError where it holds no run."""
    raw = outdir.known_run(out)
    record = parse_record(raw)
    holder = outdir.holder(out)
    standing = Standing("running" if holder else "stopped", holder, require(record.started_at, "started_at", out))
    if (summary := record.summary) is not None and not holder:
        standing.counts = {name: getattr(summary, name) for name in STATUSES}
        standing.left = summary.left
        standing.images_per_second = summary.images_per_second
        standing.state = "stopped" if standing.left else "finished"
        standing.state = "rescoring" if record.rescoring else standing.state
        return standing
    compute = require(record.compute, "compute", out)
    survey = _Survey.of(record, compute, has_start="rendering_since" in raw)
    if not require(record.settings, "settings", out).table.tables:
        standing.state = "open"
    _count(standing, survey, Manifest(out))
    return standing


def _count(standing: Standing, survey: _Survey | None, manifest: Manifest) -> None:
    """What the run found when it looked through the tables, and what it has committed since."""
    with manifest.index(since=survey.finished_at if survey else None) as index:
        rendered, times = index.statuses(), index.times
    counts = rendered + survey.before if survey else rendered
    standing.counts = {name: counts[name] for name in STATUSES}
    if survey is None:
        return
    standing.left = max(0, survey.pending - rendered.total()) + survey.before["left"]
    if not standing.holder:
        return
    if survey.has_start:
        _rate(standing, survey, rendered)
    elif times:
        _rate_of_earlier_version(standing, survey, rendered, (times[1] - times[0]).total_seconds())


def _rate(standing: Standing, survey: _Survey, rendered: Counter[str]) -> None:
    """Divide by the time until now, so that a run that commits nothing more is seen to slow down."""
    if survey.rendering_since is None or not (committed := rendered.total()):
        return
    took = (now() - survey.rendering_since).total_seconds()
    if took > 0 and standing.left is not None:
        standing.images_per_second = round((rendered["ok"] + rendered["flagged"]) / took, 3)
        standing.seconds_left = round(standing.left * took / committed)


def _rate_of_earlier_version(standing: Standing, survey: _Survey, rendered: Counter[str], took: float) -> None:
    """Without the start of rendering: known once all slots have been emptied, since the first images come late."""
    if took and standing.left is not None and rendered.total() >= survey.slots:
        rate = rendered.total() / took
        standing.images_per_second, standing.seconds_left = round(rate, 3), round(standing.left / rate)
