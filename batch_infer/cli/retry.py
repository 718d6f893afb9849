"""`batch-infer retry`: render rows again by status."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from batch_infer.cli.metrics import Metrics
from batch_infer.cli.options import command, json_option, option, out_argument, progress_option, unattended_options
from batch_infer.cli.progress import ProgressGroup, make_progress
from batch_infer.cli.report import exit_code, log_time_limit, print_result, stoppable, summary_lines
from batch_infer.settings import RetryStatus


@command(
    out_argument,
    click.argument("tables", metavar="[TABLE...]", nargs=-1),
    option(
        "--status",
        "statuses",
        envvar="BATCH_INFER_STATUS",
        type=click.Choice(get_args(RetryStatus)),
        multiple=True,
        required=True,
        help="Which rows. missing: rows whose image file was deleted. Repeatable.",
    ),
    unattended_options,
    json_option,
    progress_option,
)
def retry(
    *,
    out: Path,
    tables: tuple[str, ...],
    statuses: tuple[RetryStatus, ...],
    time_limit: float | None,
    metrics_file: Path | None,
    as_json: bool,
    quiet: bool,
    no_progress: bool,
) -> int:
    """Render again the rows of OUT that have a status.

    The tables and all settings are those of the last run, from OUT/run.json; name TABLE... if the tables were moved.
    Rows are retried however often they have failed. Other rows stay as they are; rows without a result are left to
    `run`.

    Exit codes: as those of `run`; 75 if it was stopped.
    """
    with Metrics(metrics_file, str(out)) as metrics, stoppable(time_limit) as stop:
        from batch_infer.jobs import retry_rows

        progress = ProgressGroup(make_progress(shown=not (quiet or no_progress)), metrics)
        summary, settings = retry_rows(out, statuses, tables, progress, stop)
        metrics.model = settings.model.name or "demo"
        code = exit_code(summary, settings, retry=True)
        metrics.conclude(summary, code)
    log_time_limit(stop, summary.unfinished)
    if code or not quiet:
        lines = summary_lines(summary, settings.out, settings.output.results)
        print_result(lines, summary.as_dict() if as_json else None)
    return code
