"""`batch-infer run`: score tables of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from batch_infer.cli.asked import make_run_settings
from batch_infer.cli.logs import set_up_logging
from batch_infer.cli.metrics import Metrics
from batch_infer.cli.options import job_options, json_option, logging_options, progress_option
from batch_infer.cli.progress import ProgressGroup, make_progress
from batch_infer.cli.report import exit_code, give
from batch_infer.cli.signals import report_time_limit, stoppable


@click.command(context_settings={"auto_envvar_prefix": "BATCH_INFER"})
@job_options
@json_option
@logging_options
@progress_option
def run(
    time_limit: float | None,
    metrics_file: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_progress: bool,
    **options: Any,
) -> int:
    """Score the prompts of TABLE... into OUT.

    TABLE is a file (.csv, .tsv, .parquet, .pq, .jsonl, .ndjson, .json, .txt, each also .gz, .bz2, .xz or .zst), a
    folder of them, a glob in quotes, a URL (s3://, https://, ...), or - for standard input. Its column `prompt` is
    rendered; id, negative_prompt, seed, height, width, num_inference_steps, guidance_scale, guidance_rescale and
    num_images_per_prompt are taken where they stand, and every other column is carried through to the results.
    Folders named key=value in the path of a file are columns too.

    Run the same command again to continue: what is done is skipped, what is new or changed is rendered.

    Every option is also an environment variable: BATCH_INFER_STEPS=30 is --steps 30.

    Exit codes: 0 all rows accounted for; 2 usage or settings; 3 more rows failed or were invalid than --max-failed;
    75 stopped early (a signal, --time-limit, another run in OUT), run again to continue; 1 a bug.
    """
    set_up_logging(quiet=quiet, verbose=verbose)
    with Metrics(metrics_file, options["out"], options["model"] or "demo") as metrics, stoppable(time_limit) as stop:
        settings = make_run_settings(options)
        from batch_infer.jobs import join_run  # seconds long, and a signal may come in them
        from batch_infer.jobs import render_tables as score

        if join_run(settings, stop):
            return 0
        summary = score(settings, ProgressGroup(make_progress(shown=not (quiet or no_progress)), metrics), stop)
        code = exit_code(summary, settings)
        metrics.conclude(summary, code)
    report_time_limit(stop, summary.unfinished)
    give(summary, settings, code, as_json=as_json, quiet=quiet)
    return code
