"""`batch-infer status`: how far a run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batch_infer.cli.config import config_option
from batch_infer.cli.logs import set_up_logging
from batch_infer.cli.options import json_option, logging_options, out_argument
from batch_infer.cli.report import duration, printing, say

if TYPE_CHECKING:
    from batch_infer.jobs import RunStatus


@click.command(context_settings={"auto_envvar_prefix": "BATCH_INFER"})
@config_option
@out_argument
@json_option
@logging_options
def status(out: Path, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Say how far the run in OUT is, or how far it came.

    Says what is done, flagged, blocked, failed and left, also while the run is going on. Counted are results: a row
    has one for each image. What a run that was killed has committed counts as done.

    Exit codes: 0; 2 if OUT holds no run. With -q only this error is printed.
    """
    set_up_logging(quiet=quiet, verbose=verbose)
    from batch_infer.jobs import read_status as look

    standing = look(out)
    if quiet:
        return 0
    with printing():
        if as_json:
            click.echo(json.dumps(standing.as_dict()))
        else:
            _print(standing, out)
    return 0


def _print(standing: RunStatus, out: Path) -> None:
    by = f" by {standing.holder}" if standing.holder else ""
    say(f"{out}: {standing.state}{by}, started {standing.started_at[:16]} UTC")
    told = [f"{count:,} {name}" for name, count in standing.counts.items() if count or name in ("ok", "failed")]
    if standing.left is not None:
        left = f"{standing.left:,} left"
    elif standing.state == "open":
        left = "total unknown (Azure ML endpoint output)"
    else:
        left = "the tables are being scanned" if standing.holder else "total unknown"
    say(" · ".join([*told, left]))
    if standing.images_per_second and standing.seconds_left is not None:
        say(f"{standing.images_per_second:.2f} images/s, about {duration(standing.seconds_left)} to go")
    if standing.is_stale:
        say(f"results.* are out of date: run `batch-infer merge {out}` to update them")
    if standing.state == "stopped":
        say("run the same command again to continue")
    if standing.state == "unknown":
        say(f"{out / '.lock'} may not be read by this user, so whether a run is working there is not known")
    if standing.state == "rescoring" and not standing.holder:
        say("its images are being checked again: run the same `batch-infer rescore` to continue")
