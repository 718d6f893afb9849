"""Rendering again the rows that came to a certain status."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from batch_infer.errors import SettingsError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import refuse_unrepeatable, settings_of
from batch_infer.jobs.run import Progress, render_tables
from batch_infer.jobs.summary import Summary
from batch_infer.planning import Item, ManifestEntry
from batch_infer.records import ResultRow
from batch_infer.settings import RetryStatus, RunSettings, ServiceSettings
from batch_infer.sinks import make_sink

log = logging.getLogger("batch_infer")


def retry_rows(
    out: Path,
    statuses: Collection[RetryStatus],
    tables: Sequence[str],
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Summary, RunSettings]:
    """Render again what has one of these statuses, as the last run in OUT would, and merge.

    The tables are those of that run, or these. However often a row has failed, it is tried once more. Rows that have
    no result yet are left to `run`. Raises UsageError where OUT holds no run or its tables cannot be read.
    """
    record = outdir.known_run(out)
    settings = replace(_asking(settings_of(record, out, tables)), rerender_changed=True)  # of the chosen rows alone
    if not tables:
        refuse_unrepeatable(record, out)
    summary = render_tables(settings, progress, stop, _Chosen(statuses, out))
    before, now = (_total(found) for found in (record, outdir.known_run(out)))
    if now < before:
        log.warning(
            "these tables have %d results to give and those of the run had %d: results.* lists these", now, before
        )
    return summary, settings


def _asking(settings: RunSettings) -> RunSettings:
    """With the safety service where it is now: an OUT does not say where a key is sent. Raises SettingsError."""
    if settings.safety.service is None:
        return settings
    if (here := ServiceSettings.from_environment(os.environ)) is None:
        raise SettingsError("the run asked a safety service, and CONTENT_SAFETY_ENDPOINT is not set")
    service = replace(settings.safety.service, endpoint=here.endpoint)
    return replace(settings, safety=replace(settings.safety, service=service))


def _total(record: Mapping[str, Any]) -> int:
    """The results that a run was to give, 0 where it did not come to know."""
    return int((record.get("survey") or {}).get("total", 0))


class _Chosen:
    """Leaves alone all rows but those of which an image has one of these statuses.

    Rows come in order, a row's images one after the other: those that a row did not have while it was invalid are
    rendered with its first. A row that is invalid now is no work, and `run` tells of it.
    """

    def __init__(self, statuses: Collection[RetryStatus], out: Path) -> None:
        self._statuses, self._sink = statuses, make_sink(out)
        self._row: str | None = None

    def __call__(self, item: Item, found: ManifestEntry | None) -> bool:
        if isinstance(item, ResultRow):
            return True
        if item.image_index == 0:
            self._row = None
        if found is None:
            return self._row != item.id
        is_missing = found.path is not None and "missing" in self._statuses and not self._sink.has(found.path)
        chosen = found.status in self._statuses or is_missing
        if chosen and found.status == "invalid":
            self._row = item.id
        return not chosen
