"""Rendering again the rows that came to a certain status."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from batch_infer.jobs import out as outdir
from batch_infer.jobs.job import refuse_stdin, settings_of
from batch_infer.jobs.run import Progress, run
from batch_infer.jobs.summary import Summary
from batch_infer.planning import Committed, Item, LeavesAlone
from batch_infer.settings import Retried, RunSettings


def retry(
    out: Path,
    statuses: Collection[Retried],
    tables: Sequence[str],
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Summary, RunSettings]:
    """Render again what has one of these statuses, as the last run in OUT would, and merge.

    The tables are those of that run, or these. However often a row has failed, it is tried once more. Rows that have
    no result yet are left to `run`. Raises UsageError where OUT holds no run or its tables cannot be read.
    """
    settings = settings_of(outdir.known_run(out), out, tables)
    if not tables:
        refuse_stdin(settings)
    return run(settings, progress, stop, leaves_all_but(statuses, out)), settings


def leaves_all_but(statuses: Collection[Retried], out: Path) -> LeavesAlone:
    """Leaves alone what has none of these statuses."""

    def leaves_alone(item: Item, found: Committed | None) -> bool:
        if found is None:
            return True
        gone = found.path is not None and "missing" in statuses and not (out / found.path).is_file()
        return found.status not in statuses and not gone

    return leaves_alone
