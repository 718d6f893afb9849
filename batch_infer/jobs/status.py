"""How far a run is, told from what it has written: also while it goes on, and after it was killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import known_form
from batch_infer.manifest import Manifest
from batch_infer.records import Status

STATUSES = get_args(Status)


@dataclass(slots=True)
class Standing:
    """Results by status and those that are left, None while the tables are still being looked through.

    `state`: running, finished, or stopped (run again to go on). `holder` is the process that works in OUT.
    `images_per_second` and `seconds_left` are told of a run that goes on.
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


def status(out: Path) -> Standing:
    """Look at OUT, without holding it. Raises UsageError where it holds no run."""
    record = outdir.known_run(out)
    with known_form(record, out):
        return _look(record, out)


def _look(record: Mapping[str, Any], out: Path) -> Standing:
    holder = outdir.holder(out)
    summary, survey = record.get("summary"), record.get("survey")
    standing = Standing("running" if holder else "stopped", holder, record["started_at"])
    if summary is not None and not holder:
        standing.counts = {name: summary[name] for name in STATUSES}
        standing.left = summary["left"]
        standing.state = "stopped" if standing.left else "finished"
    elif survey is not None:
        _count(standing, survey, Manifest(out), slots=record["compute"]["slots"])
    else:
        with Manifest(out).index() as index:
            standing.counts = {name: index.statuses()[name] for name in STATUSES}
    return standing


def _count(standing: Standing, survey: Mapping[str, Any], manifest: Manifest, slots: int) -> None:
    """What the run found when it looked through the tables, and what it has committed since.

    The speed is told once all slots have been emptied: the first images come after a wait, and then in a crowd.
    """
    since = datetime.fromisoformat(survey["finished_at"])
    with manifest.index(since=since) as index:
        rendered, times = index.statuses(), index.times
    before = Counter(survey["standing"])
    found = rendered + before
    standing.counts = {name: found[name] for name in STATUSES}
    standing.counts["invalid"] += survey["invalid"]
    standing.left = max(0, survey["pending"] - rendered.total()) + before["left"]
    took = (max(times) - min(times)).total_seconds() if times else 0.0
    if standing.holder and took and rendered.total() >= slots:
        rate = rendered.total() / took
        standing.images_per_second, standing.seconds_left = round(rate, 3), round(standing.left / rate)
