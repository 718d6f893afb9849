"""`batch-infer rescore`: judge stored images again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batch_infer.cli.asked import make_safety_settings
from batch_infer.cli.config import config_option
from batch_infer.cli.logs import log, set_up_logging
from batch_infer.cli.options import json_option, logging_options, on_flagged_option, out_argument
from batch_infer.cli.report import ROWS_FAILED, number, printing, say, told_counts
from batch_infer.cli.signals import stoppable

if TYPE_CHECKING:
    from batch_infer.jobs import RescoreCounts


@click.command(context_settings={"auto_envvar_prefix": "BATCH_INFER"})
@config_option
@out_argument
@click.argument("tables", metavar="[TABLE...]", nargs=-1)
@click.option(
    "--safety",
    type=click.Choice(["checker", "azure", "checker,azure"]),
    required=True,
    help="Who judges: the model's own checker, Azure AI Content Safety, or both.",
)
@on_flagged_option
@json_option
@logging_options
def rescore(out: Path, tables: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool, **options: Any) -> int:
    """Judge the stored images of OUT again, and render nothing.

    For other judges, thresholds or another --on-flagged than those of the run; `run` with the same --safety goes on
    from there. With blank, blur and drop the originals of images that are flagged are lost; a warning says so first.
    The service checks the prompts too: an image whose prompt it refuses is flagged. A flagged image that was
    blanked, blurred or dropped cannot be judged again: it stays flagged, and its error says so; `retry --status
    flagged` renders it. One that is missing, damaged or cannot be opened, or has no answer, has failed and is left to
    `run`, and so is a prompt that is no longer blocked. A kill loses no image: run the same command again to continue.

    Exit codes: 0; 2 usage or settings; 3 where some failed; 75 stopped, or the service is down: run again to go on.
    """
    set_up_logging(quiet=quiet, verbose=verbose)

    def tell(found: RescoreCounts) -> None:
        log.debug("%s judged", number(found.judged, "image"))

    with stoppable() as stop:
        from batch_infer.jobs import rescore_images as judge_again

        found, counts = judge_again(out, tables, make_safety_settings({**options, "require_safety": True}), tell, stop)
    code = ROWS_FAILED if found.failed else 0
    if code or not quiet:
        with printing():
            if as_json:
                click.echo(json.dumps({**asdict(found), "counts": asdict(counts)}))
            else:
                _report(found)
                say(told_counts(counts))
                if counts.left:
                    say(f"{counts.left:,} left: `batch-infer run` renders them")
    return code


def _report(found: RescoreCounts) -> None:
    say(f"{number(found.judged, 'image')} judged: {found.flagged:,} flagged, {found.changed:,} changed")
    if found.unjudged:
        say(f"{found.unjudged:,} flagged before cannot be judged again: their image was not kept")
    if found.failed:
        say(f"{found.failed:,} failed: `batch-infer run` renders them")
