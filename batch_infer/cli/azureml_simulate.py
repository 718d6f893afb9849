"""`batch-infer azureml-simulate`: a batch scoring script, run here as Azure ML's batch endpoint runs it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from batch_infer.cli.config import config_option
from batch_infer.cli.logs import is_json, log, set_up_logging
from batch_infer.cli.options import json_option, logging_options, progress_option
from batch_infer.cli.progress import LINE_EVERY
from batch_infer.cli.report import duration, number, printing, say
from batch_infer.cli.signals import NOTHING_KEPT, stoppable
from batch_infer.cli.time_limit import Duration

if TYPE_CHECKING:
    from batch_infer.simulation import Outcome

JOB_FAILED = 3
"""The exit code where Azure would say that the job has failed."""


@click.command("azureml-simulate", context_settings={"auto_envvar_prefix": "BATCH_INFER"})
@config_option
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    default="batch-infer-out",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for what the script writes, predictions.csv and logs.",
)
@click.option(
    "--script",
    type=click.Path(path_type=Path),
    metavar="FILE.py",
    help="The scoring script; default: batch-infer's own.",
)
@click.option(
    "--model-dir", type=click.Path(path_type=Path), metavar="DIR", help="What AZUREML_MODEL_DIR names for the script."
)
@click.option(
    "--mini-batch-size",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="N",
    help="Files that one call of run() gets.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Worker processes. Default: one for each GPU, else 1."
)
@click.option(
    "--timeout",
    type=Duration(),
    default="30s",
    show_default=True,
    help="How long a mini-batch may take before its worker is killed.",
)
@click.option(
    "--max-retries",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    metavar="N",
    help="How often a mini-batch is tried again.",
)
@click.option(
    "--error-threshold",
    type=click.IntRange(min=-1),
    default=-1,
    show_default=True,
    metavar="N",
    help="Failed files that are still a success; -1: any number.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=0),
    metavar="N",
    help="The first N workers see one GPU each. Default: those that nvidia-smi tells of.",
)
@click.option(
    "--kill",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="The share of mini-batches whose worker is killed in the midst of them.",
)
@click.option(
    "--duplicate",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="The share of mini-batches that is delivered twice.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Of the order of files, and of these shares."
)
@click.option(
    "--settings-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="How predictions.csv is written; default: parallel_run_step.settings.json beside the script.",
)
@click.option(
    "--output-action",
    type=click.Choice(["append_row", "summary_only"]),
    default="append_row",
    show_default=True,
    help="Whether predictions.csv is written.",
)
@json_option
@logging_options
@progress_option
def azureml_simulate(as_json: bool, quiet: bool, verbose: bool, no_progress: bool, **options: Any) -> int:
    """Run a batch scoring script over files as Azure ML's batch endpoint does, before you deploy it.

    INPUT is a folder, whose files are scored but not those of folders in it, or a file. They go to worker processes in
    mini-batches; each worker has a temporary working folder, a GPU of its own where there is one, and its log in
    OUT/logs/azureml. Your environment reaches the script. Results that run() returns are appended to
    OUT/predictions.csv, which is begun anew.

    A mini-batch that raises, returns neither a list nor a DataFrame, takes too long, or takes its worker with it is
    tried again. With --kill and --duplicate that happens to a sound script too: what it leaves should be the same.

    Exit codes: 0; 2 usage; 3 where Azure would say that the job has failed; 75 interrupted.
    """
    set_up_logging(quiet=quiet, verbose=verbose)
    from batch_infer.simulation import DEFAULT_SCRIPT, SimulationSettings, simulate

    append_rows = options.pop("output_action") == "append_row"
    script = options.pop("script") or DEFAULT_SCRIPT
    settings = SimulationSettings(script=script, append_rows=append_rows, **options)
    progress = _Progress(shown=not (quiet or no_progress))
    with stoppable(hint=NOTHING_KEPT):
        try:
            outcome = simulate(settings, progress)
        finally:
            progress.close()
    if outcome.fault is not None or not quiet:
        with printing():
            click.echo(json.dumps(outcome.as_dict())) if as_json else _print(outcome)
    return 0 if outcome.fault is None else JOB_FAILED


class _Progress:
    """A bar on a terminal, otherwise a line of the log every few seconds; nothing where it is not shown."""

    def __init__(self, *, shown: bool) -> None:
        self._shown, self._told = shown, time.monotonic()
        self._bar: tqdm[Any] | None = None

    def __call__(self, outcome: Outcome) -> None:
        if not self._shown:
            return
        if sys.stderr.isatty() and not is_json():
            self._draw(outcome)
        elif (now := time.monotonic()) - self._told >= LINE_EVERY:
            self._told = now
            counts = {"settled": outcome.settled, "mini_batches": outcome.mini_batches, "rows": outcome.rows}
            log.info("%(settled)d of %(mini_batches)d mini-batches, %(rows)d rows", counts, extra=counts)

    def _draw(self, outcome: Outcome) -> None:
        if self._bar is None:
            self._bar = tqdm(total=outcome.mini_batches, unit="mini-batch", dynamic_ncols=True)
        self._bar.set_postfix_str(f"{number(outcome.rows, 'row')}, {outcome.failed} failed", refresh=False)
        self._bar.update(outcome.settled - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _print(outcome: Outcome) -> None:
    say(
        f"{outcome.mini_batches:,} mini-batch{'es' * (outcome.mini_batches != 1)} of {number(outcome.files, 'file')} · "
        f"{outcome.succeeded:,} succeeded, {outcome.failed:,} failed; {number(outcome.failed_files, 'file')} failed"
    )
    reasons = [
        f"{count:,} {told}"
        for told, count in (
            ("retries", outcome.retries),
            ("duplicates", outcome.duplicates),
            ("killed", outcome.kills),
            ("kills that hit no run", outcome.kills_missed),
            ("timed out", outcome.timeouts),
            ("deaths", outcome.deaths),
        )
        if count
    ]
    say(" · ".join([f"{outcome.deliveries:,} deliver{'y' if outcome.deliveries == 1 else 'ies'}", *reasons]))
    if (rate := outcome.rows_per_second) is not None:
        spent, whole = duration(outcome.running_seconds), duration(outcome.seconds)
        say(f"{number(outcome.rows, 'row')} in {spent} ({rate:.2f} rows/s), {whole} in all")
    if outcome.predictions is not None:
        say(f"rows     {outcome.predictions}")
    say(f"logs     {outcome.logs}")
    if outcome.fault is not None:
        say(f"the job has failed: {outcome.fault}", keep="\n")
