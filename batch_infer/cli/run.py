"""`batch-infer run`: score tables of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from batch_infer.cli.options import (
    model_options,
    output_options,
    row_options,
    run_settings,
    table_options,
)
from batch_infer.cli.progress import make_progress, set_up_logging
from batch_infer.cli.report import report
from batch_infer.cli.signals import stop_on_signals
from batch_infer.errors import Interrupted

ROWS_FAILED = 3


@click.command(context_settings={"auto_envvar_prefix": "BATCH_INFER"})
@table_options
@model_options
@row_options
@output_options
@click.option("--overwrite", is_flag=True, help="Remove what earlier runs made in OUT and start anew.")
@click.option("--json", "as_json", envvar="BATCH_INFER_JSON", is_flag=True, help="Print the summary as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on success, for cron.")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
@click.option("--no-progress", is_flag=True, help="No progress bar or lines.")
def run(as_json: bool, quiet: bool, verbose: bool, no_progress: bool, **options: Any) -> int:
    """Score the prompts of TABLE... into OUT.

    TABLE is a CSV or Parquet file, a folder of them, or a glob in quotes. Its column `prompt` is rendered; id,
    negative_prompt, seed, height, width, num_inference_steps, guidance_scale, guidance_rescale and
    num_images_per_prompt are taken where they stand, and every other column is carried through to the results.

    Run the same command again to go on: what is done is skipped, what is new or changed is rendered.

    Every option is also an environment variable: BATCH_INFER_STEPS=30 is --steps 30.

    Exit codes: 0 all rows accounted for; 2 usage or settings; 3 more rows failed or were invalid than --max-failed;
    75 stopped early, run again to go on; 1 a bug.
    """
    settings = run_settings(options)
    set_up_logging(quiet=quiet, verbose=verbose)
    with stop_on_signals() as stop:
        from batch_infer.jobs.run import run as score  # seconds long, and a signal may come in them

        summary = score(settings, make_progress(shown=not (quiet or no_progress)), stop)
    counts = summary.counts
    within = settings.max_failed.allows(counts.bad_rows, counts.rows)
    if not quiet or not within or counts.left:
        report(summary, Path(settings.out), settings.output.results, as_json=as_json)
    if counts.left:
        return Interrupted.exit_code
    return 0 if within else ROWS_FAILED
