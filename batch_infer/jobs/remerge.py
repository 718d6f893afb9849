"""Merging without a run: the results of an OUT as its manifest has them now."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batch_infer.errors import DamagedPart, ServiceError, UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import open_tables, refuse_unrepeatable, rules_of, settings_of
from batch_infer.jobs.merge import Counts, merge, merge_parts
from batch_infer.jobs.recovery import remove_leftovers
from batch_infer.jobs.run_json import ended_in_order, with_counts
from batch_infer.manifest import Manifest
from batch_infer.planning import make_finished_check
from batch_infer.settings import OutputSettings, ResultsFormat, RunSettings
from batch_infer.store import path_exists

log = logging.getLogger("batch_infer")


def merge_results(
    out: Path, results: tuple[ResultsFormat, ...], *, base64: bool
) -> tuple[Counts, tuple[ResultsFormat, ...]]:
    """Write results.* in these formats and those of the run; returns what was counted, and the formats.

    run.json then has these counts, so that `status` says what results.* say.

    Raises UsageError where OUT holds nothing to merge or base64 no format to be in, LockedError while a run holds it,
    StorageError.
    """
    out = out.absolute()
    if not path_exists(out / "run.json") and not Manifest(out).parts():
        raise UsageError(f"{out} holds neither a run.json nor a manifest: nothing to merge")
    with outdir.locked(out):
        if outdir.read_run(out) is None:
            return merge_parts(Manifest(out), [], out, OutputSettings(results=results, base64=base64)), results
        record = outdir.known_run(out)
        outdir.refuse_while_rescored(out, record)
        settings = settings_of(record, out)
        kinds = tuple(dict.fromkeys((*settings.output.results, *results)))  # what the run wrote is not left out of date
        output = OutputSettings(results=kinds, base64=base64 or settings.output.base64)
        try:
            if not ended_in_order(record) and settings.table.tables:
                remove_leftovers(out, Manifest(out))  # not an endpoint's: its workers may be writing now
            counts = _merge(record, settings, output)
        except DamagedPart as damage:
            if settings.table.tables:
                raise
            raise UsageError(
                f"{damage.part} is damaged ({damage.reason}): send its tables to the endpoint again with the same"
                " output folder, which renders their rows anew, or move the part away to merge without it"
            ) from damage
        outdir.write_run(out, with_counts(record, asdict(counts)))
        return counts, kinds


def _merge(record: Mapping[str, Any], settings: RunSettings, output: OutputSettings) -> Counts:
    """By the tables of the run where they are as they were, else by the manifest alone."""
    out, rules = settings.out, rules_of(record, settings.out)
    if not settings.table.tables:  # they came to a door one after the other
        return merge_parts(Manifest(out), [], out, output)
    try:
        refuse_unrepeatable(record, out)
        tables = open_tables(settings)
    except (UsageError, ServiceError) as error:
        reason = str(error)
    else:
        with tables:
            new = [
                fault
                for name, fault in tables.unreadable_files.items()
                if name not in record.get("unreadable_tables", ())
            ]
            if not new:
                with Manifest(out).index() as index:
                    return merge(tables.rows(rules, make_finished_check(index)), index, tables.carried, out, output)
        reason = "; ".join(new)
    log.warning("the tables of this run are not at hand, so all that the manifest holds is merged (%s)", reason)
    counts = merge_parts(Manifest(out), record.get("tables", ()), out, output)
    total = (record.get("survey") or {}).get("total", 0)
    counts.left = max(0, total - counts.results)
    return counts
