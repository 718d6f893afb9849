"""Merging without a run: the results of an OUT as its manifest has them now."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from batch_infer.errors import UsageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import open_tables, refuse_stdin, rules_of, settings_of
from batch_infer.jobs.merge import Counts, merge, merge_parts
from batch_infer.manifest import Manifest
from batch_infer.settings import OutputSettings, ResultsFormat

log = logging.getLogger("batch_infer")


def remerge(out: Path, results: tuple[ResultsFormat, ...], *, base64: bool) -> tuple[Counts, tuple[ResultsFormat, ...]]:
    """Write results.* in these formats, or those of the run; returns what was counted, and the formats.

    Raises UsageError where OUT holds nothing to merge, LockedError while a run holds it, StorageError.
    """
    out = out.absolute()
    if not (out / "run.json").exists() and not Manifest(out).parts():
        raise UsageError(f"{out} holds neither a run.json nor a manifest: nothing to merge")
    with outdir.locked(out):
        record = outdir.read_run(out)
        output = OutputSettings(results=results, base64=base64)
        if record is None:
            return merge_parts(Manifest(out), [], out, output), output.results
        if not results:
            output = settings_of(record, out).output
            output = replace(output, base64=base64 or output.base64)
        return _merge(record, out, output), output.results


def _merge(record: Mapping[str, Any], out: Path, output: OutputSettings) -> Counts:
    """By the tables of the run where they are as they were, else by the manifest alone."""
    settings = settings_of(record, out)
    try:
        refuse_stdin(settings)
        with open_tables(settings) as tables, Manifest(out).index() as index:
            if not tables.faults.keys() - set(record.get("unreadable_tables", ())):
                return merge(tables.rows(rules_of(record, out)), index, tables.carried, out, output)
            reason = "; ".join(tables.faults.values())
    except UsageError as error:
        reason = str(error)
    log.warning("the tables of this run are not at hand, so all that the manifest holds is merged (%s)", reason)
    return merge_parts(Manifest(out), record.get("tables", ()), out, output)
