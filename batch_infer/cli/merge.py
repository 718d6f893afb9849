"""`batch-infer merge`: results.* from the manifest."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from batch_infer.cli.config import config_option
from batch_infer.cli.logs import set_up_logging
from batch_infer.cli.options import json_option, logging_options, out_argument, results_options
from batch_infer.cli.report import printing, say, told_counts, told_results
from batch_infer.cli.signals import stoppable
from batch_infer.settings import ResultsFormat


@click.command(context_settings={"auto_envvar_prefix": "BATCH_INFER"})
@config_option
@out_argument
@results_options
@json_option
@logging_options
def merge(
    out: Path, results: tuple[ResultsFormat, ...], base64: bool, as_json: bool, quiet: bool, verbose: bool
) -> int:
    """Write OUT/results.* from OUT's manifest.

    The results stand in input order. `run` does this at its end; it is left to you after a run that was killed, and
    where workers on a cluster have committed parts. The tables that run.json names decide which rows there are; where
    they are not at hand, all that the manifest holds is merged. The formats are those of the run, and those of
    --results.

    Exit codes: 0; 2 if OUT holds no run; 75 while a run holds OUT, or interrupted.
    """
    set_up_logging(quiet=quiet, verbose=verbose)
    with stoppable(hint="results.* are as they were. Run the same command again"):
        from batch_infer.jobs import merge_results

        counts, formats = merge_results(out, results, base64=base64)
    if quiet:
        return 0
    with printing():
        if as_json:
            click.echo(json.dumps(asdict(counts)))
        else:
            say(told_counts(counts))
            say(told_results(out, formats))
            if counts.left:
                say(f"{counts.left:,} left: run again to continue")
    return 0
