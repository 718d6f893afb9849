"""`batch-infer status`: the progress of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from batch_infer.cli.options import command, json_option, out_argument
from batch_infer.cli.report import format_duration, print_result

if TYPE_CHECKING:
    from batch_infer.jobs import RunStatus


@command(out_argument, json_option)
def status(*, out: Path, as_json: bool, quiet: bool) -> int:
    """Show the progress of the run in OUT, whether it is running, stopped or finished.

    Counts results by status, and those that are left: a row has one result per image. Rows that a killed run has
    committed count as done.

    Exit codes: 0; 2 if OUT holds no run. With -q only this error is printed.
    """
    from batch_infer.jobs import read_status

    run_status = read_status(out)
    if not quiet:
        print_result(_lines(run_status, out), run_status.as_dict() if as_json else None)
    return 0


def _lines(run: RunStatus, out: Path) -> Iterator[str]:
    holder = f" by {run.holder}" if run.holder else ""
    yield f"{out}: {run.state}{holder}, started {run.started_at[:16]} UTC"
    counts = [f"{count:,} {name}" for name, count in run.counts.items() if count or name in ("ok", "failed")]
    if run.remaining is not None:
        left = f"{run.remaining:,} left"
    elif run.state == "open":
        left = "total unknown (Azure ML endpoint output)"
    else:
        left = "the tables are being scanned" if run.holder else "total unknown"
    yield " · ".join([*counts, left])
    if run.images_per_second and run.seconds_left is not None:
        yield f"{run.images_per_second:.2f} images/s, about {format_duration(run.seconds_left)} left"
    if run.is_stale:
        yield f"results.* are out of date: run `batch-infer merge {out}` to update them"
    if run.state == "stopped":
        yield "run the same command again to continue"
    if run.state == "unknown":
        yield f"{out / '.lock'} cannot be read (permission denied), so it is unknown whether a run is active"
    if run.state == "rescoring" and not run.holder:
        yield "its images are being checked again: run the same `batch-infer rescore` to continue"
