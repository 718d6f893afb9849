"""`batch-infer retry`: render again what failed."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from batch_infer.cli.config import config_option
from batch_infer.cli.logs import set_up_logging
from batch_infer.cli.metrics import Metrics
from batch_infer.cli.options import json_option, logging_options, out_argument, progress_option, unattended_options
from batch_infer.cli.progress import ProgressGroup, make_progress
from batch_infer.cli.report import exit_code, give
from batch_infer.cli.signals import report_time_limit, stoppable
from batch_infer.settings import Retried


@click.command(context_settings={"auto_envvar_prefix": "BATCH_INFER"})
@config_option
@out_argument
@click.argument("tables", metavar="[TABLE...]", nargs=-1)
@click.option(
    "--status",
    "statuses",
    envvar="BATCH_INFER_STATUS",
    type=click.Choice(get_args(Retried)),
    multiple=True,
    required=True,
    help="Which rows. missing: those whose image file is gone. Repeatable.",
)
@unattended_options
@json_option
@logging_options
@progress_option
def retry(
    out: Path,
    tables: tuple[str, ...],
    statuses: tuple[Retried, ...],
    time_limit: float | None,
    metrics_file: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
) -> int:
    """Render again the rows of OUT that have a status.

    The tables and all settings are those of the last run, as OUT/run.json has them; name TABLE... where the tables
    have moved. A row is tried again however often it has failed. Other rows stay as they are, and those that have no
    result yet are left to `run`.

    Exit codes: as those of `run`; 75 if it was stopped.
    """
    set_up_logging(quiet=quiet, verbose=verbose)
    with Metrics(metrics_file, str(out)) as metrics, stoppable(time_limit) as stop:
        from batch_infer.jobs import retry_rows as render_again

        listeners = ProgressGroup(make_progress(shown=not (quiet or no_progress)), metrics)
        summary, settings = render_again(out, statuses, tables, listeners, stop)
        metrics.model = settings.model.name or "demo"
        code = exit_code(summary, settings, retry=True)
        metrics.conclude(summary, code)
    report_time_limit(stop, summary.unfinished)
    give(summary, settings, code, as_json=as_json, quiet=quiet)
    return code
