"""`batch-infer rescore`: judge stored images again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batch_infer.cli.config import config_option
from batch_infer.cli.logs import log, set_up_logging
from batch_infer.cli.options import json_option, logging_options, out_argument, safety_options, safety_settings
from batch_infer.cli.report import ROWS_FAILED, number, printing, told_counts
from batch_infer.cli.signals import stop_on_signals

if TYPE_CHECKING:
    from batch_infer.jobs.rejudging import Rescored


@click.command(context_settings={"auto_envvar_prefix": "BATCH_INFER"})
@config_option
@out_argument
@click.argument("tables", metavar="[TABLE...]", nargs=-1)
@safety_options
@json_option
@logging_options
def rescore(out: Path, tables: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool, **options: Any) -> int:
    """Judge the stored images of OUT again, and render nothing.

    For other judges, thresholds or another --on-flagged than those of the run: what is judged is as if a run had been
    made with them, and `run` with the same --safety goes on from there. Prompts are not asked about again. An image
    that was blanked, blurred or dropped cannot be judged again, nor can a prompt that was refused: what was said of
    them stays, and their error says so; `retry --status flagged` or `--status blocked` renders them. An image that is
    missing, or on which the service has no word, has failed: `run` renders it.

    Exit codes: 0; 2 usage or settings; 3 where some failed; 75 stopped, or the service is down: run again to go on.
    """
    set_up_logging(quiet=quiet, verbose=verbose)
    from batch_infer.jobs.rescore import rescore as judge_again

    def tell(found: Rescored) -> None:
        log.debug("%s judged", number(found.judged, "image"))

    with stop_on_signals() as stop:
        found, counts = judge_again(out, tables, safety_settings(options), tell, stop)
    code = ROWS_FAILED if found.failed else 0
    if code or not quiet:
        with printing():
            if as_json:
                click.echo(json.dumps({**asdict(found), "counts": asdict(counts)}))
            else:
                _report(found)
                click.echo(told_counts(counts))
    return code


def _report(found: Rescored) -> None:
    click.echo(f"{number(found.judged, 'image')} judged: {found.flagged:,} flagged, {found.changed:,} changed")
    if found.unjudged:
        click.echo(f"{found.unjudged:,} cannot be judged again: they were blocked, or their image was not kept")
    if found.failed:
        click.echo(f"{found.failed:,} failed: `batch-infer run` renders them")
