"""Report the progress of a run from its files, even after it ended or was killed."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any, ClassVar, get_args

import msgspec

from batch_infer.errors import StorageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.run_json import RunRecord, parse_record, require
from batch_infer.jobs.summary import JsonStruct, Summary
from batch_infer.manifest import Manifest
from batch_infer.records import Status, utc_now
from batch_infer.settings import RunSettings
from batch_infer.store import Out, open_store

STATUSES = get_args(Status)
OTHER_KEYS = {*STATUSES, "rows", "images", "left", "undone", "folders", "bad_results", "images_per_second"}
"""Keys of a summary that `RunStatus.as_dict` leaves out: its own keys say the same, or only `run` needs them."""


class RunStatus(JsonStruct, rename={"remaining": "left"}):
    """State and progress of a run. `counts` counts results by status.

    `remaining` is None if the total is unknown, as while the tables are scanned. `state` is running, finished, stopped
    (run again to continue), rescoring (unfinished), open (written by an endpoint, so that the total is unknown) or
    unknown (unfinished, and this user may not read the lock). `holder` describes the process that holds the lock, if
    any. `is_stale` means that results.* may lack results that were committed later. `images_per_second` is the rate
    since the first worker was ready, if known, and `seconds_left` is None unless the run is active. `gallery` is the
    path or URL of OUT's gallery, if it has one.

    `figures` has the keys of the summary in run.json. For an active or killed run, they may be half a
    minute old, and the only counts are those of results by status, truncated prompts and reasons.
    """

    state: str
    holder: str | None
    started_at: str
    counts: dict[str, int] = {}
    remaining: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    is_stale: bool = False
    gallery: str | None = None
    figures: dict[str, Any] = {}
    settings: RunSettings | None = None
    only_if_known: ClassVar[frozenset[str]] = frozenset({"gallery"})

    @property
    def summary(self) -> Summary | None:
        """The summary with these figures, or None if there are none or a value has another type."""
        with suppress(msgspec.ValidationError):
            return Summary.from_dict(self.figures) if self.figures else None
        return None

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended, or its results were merged after a kill, so that all counts are known."""
        return self.state in ("finished", "stopped") and "rows" in self.figures

    def as_dict(self) -> dict[str, Any]:
        """Return the status as --json prints it: with the figures that are known, and without settings."""
        status = JsonStruct.as_dict(msgspec.structs.replace(self, settings=None, figures={}))
        del status["figures"], status["settings"]
        known = self.figures.items()
        return {
            **status,
            **{key: value for key, value in known if key not in OTHER_KEYS and value not in (None, {}, [])},
        }


def read_status(out: Out) -> RunStatus:
    """Return the status of OUT without locking it. Raises StorageError, and UsageError, e.g. if OUT contains no run."""
    store = open_store(out)
    data = outdir.read_existing_run(store)
    record = parse_record(data)
    try:
        holder = store.find_holder()
        state = "running" if holder else "stopped"
    except StorageError:  # this user may not read the lock
        holder, state = None, "unknown"
    status = RunStatus(state, holder, require(record.started_at, "started_at", store.location))
    status.settings = require(record.settings, "settings", store.location)
    status.gallery = outdir.find_gallery(store)
    is_open = not status.settings.table.tables
    summary = record.summary or (None if is_open else record.merged)
    if summary is not None:  # an active run may not have replaced the earlier run.json yet
        status.counts = {name: getattr(summary, name) for name in STATUSES}
        status.remaining = summary.remaining
        if not holder:
            status.images_per_second = summary.images_per_second
            status.state = "stopped" if status.remaining else "finished"
            status.figures = data.get("summary") or data.get("merged") or {}
    else:
        status.state = "open" if is_open else status.state
        status.is_stale = status.state == "stopped" and not record.rescoring
        _count_results(status, record, Manifest(store))
        status.figures = {**record.progress, **status.counts} if record.progress else {}
    status.state = "rescoring" if record.rescoring else status.state
    return status


def _count_results(status: RunStatus, record: RunRecord, manifest: Manifest) -> None:
    """Count the results that the run skipped or committed.

    Count the whole manifest if the scan is unfinished, if an earlier version wrote OUT without a run number, or during
    a rescore, which commits results of earlier runs again.
    """
    scan, run = record.survey, record.run_number
    is_partial = scan is not None and run is not None and not record.rescoring
    with manifest.index(run if is_partial and run else 0) as index:
        committed = index.count_statuses()
    status.counts = {name: committed[name] for name in STATUSES}
    if scan is None:
        return
    if not is_partial:
        status.remaining = max(0, scan.total - committed.total())
        return
    rendered = committed - Counter(invalid=committed["invalid"])
    counts = Counter(scan.skipped) + Counter(invalid=scan.invalid) + rendered
    status.counts = {name: counts[name] for name in STATUSES}
    status.remaining = max(0, scan.pending - rendered.total()) + counts["left"]
    if status.holder:
        _estimate(status, record, rendered)


def _estimate(status: RunStatus, record: RunRecord, rendered: Counter[str]) -> None:
    """Set the rate and the remaining time. The rate is that up to now, so that it drops while a run is stalled."""
    committed = rendered.total()
    if record.rendering_since is None or committed < max(1, record.in_flight):
        return
    seconds = (utc_now() - record.rendering_since).total_seconds()
    if seconds > 0 and status.remaining is not None:
        status.images_per_second = round((rendered["ok"] + rendered["flagged"]) / seconds, 3)
        status.seconds_left = round(status.remaining * seconds / committed)
