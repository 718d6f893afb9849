"""`batch-infer run`: render tables of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batch_infer.cli.metrics import Metrics
from batch_infer.cli.options import command, job_options, json_option, progress_option
from batch_infer.cli.progress import ProgressGroup, make_progress
from batch_infer.cli.report import exit_code, log_time_limit, print_result, stoppable, summary_lines
from batch_infer.cli.settings import make_run_settings


@command(job_options, json_option, progress_option)
def run(
    *,
    time_limit: float | None,
    metrics_file: Path | None,
    as_json: bool,
    quiet: bool,
    no_progress: bool,
    **options: Any,
) -> int:
    """Render the prompts of TABLE... into OUT.

    TABLE is a file (.csv, .tsv, .parquet, .pq, .parq, .jsonl, .ndjson, .json, .txt, each also .gz, .bz2, .xz or
    .zst), a folder of them, a glob in quotes, a URL (s3://, https://, ...), or - for standard input. The column
    `prompt` is required; id, negative_prompt, seed, height, width, num_inference_steps, guidance_scale,
    guidance_rescale and num_images_per_prompt are optional, and all other columns are carried through to the results.
    Folders named key=value in the path of a file are columns too.

    Run the same command again to resume: finished rows are skipped, new and changed ones are rendered.

    Every option is also an environment variable: BATCH_INFER_STEPS=30 is --steps 30.

    Exit codes: 0 all rows accounted for; 2 usage or settings; 3 more rows failed or were invalid than --max-failed;
    75 stopped early (a signal, --time-limit, another run in OUT), run again to continue; 1 a bug.
    """
    with Metrics(metrics_file, options["out"], options["model"] or "demo") as metrics, stoppable(time_limit) as stop:
        settings = make_run_settings(options)
        from batch_infer.jobs import join_run, render_tables  # takes seconds, in which a signal may come

        if join_run(settings, stop):
            return 0
        progress = ProgressGroup(make_progress(shown=not (quiet or no_progress)), metrics)
        summary = render_tables(settings, progress, stop)
        code = exit_code(summary, settings)
        metrics.conclude(summary, code)
    log_time_limit(stop, summary.unfinished)
    if code or not quiet:
        lines = summary_lines(summary, settings.out, settings.output.results)
        print_result(lines, summary.as_dict() if as_json else None)
    return code
