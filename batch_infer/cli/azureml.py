"""Commands for Azure ML: `batch-infer azureml-simulate` and `batch-infer export-mlflow`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from batch_infer.cli.logs import log
from batch_infer.cli.options import command, compute_options, json_option, model_options, option, progress_option
from batch_infer.cli.progress import LOG_INTERVAL, shows_bar
from batch_infer.cli.report import NOTHING_KEPT, format_count, format_duration, print_result, stoppable
from batch_infer.cli.settings import make_compute_settings, make_model_settings
from batch_infer.cli.values import NONNEGATIVE, PATH, POSITIVE, SHARE, parse_duration
from batch_infer.errors import SettingsError
from batch_infer.extras import install_command

if TYPE_CHECKING:
    from batch_infer.simulation import SimulationOutcome

JOB_FAILED = 3
"""Exit code if Azure would report the job as failed."""


@command(
    click.Argument(["inputs"], metavar="INPUT...", nargs=-1, required=True, type=PATH),
    option("-o", "--out", default="batch-infer-out", type=PATH, help="Folder for output, predictions.csv and logs."),
    option("--script", type=PATH, metavar="FILE.py", help="Scoring script. Default: batch-infer's own."),
    option("--model-dir", type=PATH, metavar="DIR", help="Folder that the script sees as AZUREML_MODEL_DIR."),
    option("--mini-batch-size", type=POSITIVE, default=10, metavar="N", help="Number of files per call of run()."),
    option("--workers", type=POSITIVE, metavar="N", help="Number of worker processes. Default: one per GPU, else 1."),
    option(
        "--timeout",
        type=parse_duration,
        default="30s",
        metavar="DURATION",
        help="Time limit for a mini-batch, after which its worker is killed.",
    ),
    option("--max-retries", type=NONNEGATIVE, default=3, metavar="N", help="Maximum retries of a mini-batch."),
    option(
        "--error-threshold",
        type=click.IntRange(min=-1),
        default=-1,
        metavar="N",
        help="Maximum number of failed files: if more fail, the job fails. -1: no limit.",
    ),
    option(
        "--gpus",
        type=NONNEGATIVE,
        metavar="N",
        help="Number of GPUs: the first N workers see one each. Default: the number that nvidia-smi lists.",
    ),
    option(
        "--kill",
        type=SHARE,
        default=0.0,
        metavar="SHARE",
        help="Share of mini-batches whose worker is killed during run().",
    ),
    option("--duplicate", type=SHARE, default=0.0, metavar="SHARE", help="Share of mini-batches delivered twice."),
    option("--seed", type=int, default=0, metavar="N", help="Seed for the file order, kills and duplicates."),
    option(
        "--settings-file",
        type=PATH,
        metavar="FILE",
        help="JSON file with the format of predictions.csv. Default: parallel_run_step.settings.json in the script's "
        "folder.",
    ),
    option(
        "--output-action",
        type=click.Choice(["append_row", "summary_only"]),
        default="append_row",
        help="append_row: write predictions.csv; summary_only: do not.",
    ),
    json_option,
    progress_option,
    name="azureml-simulate",
)
def azureml_simulate(*, as_json: bool, quiet: bool, no_progress: bool, **options: Any) -> int:
    """Run a scoring script like an Azure ML batch endpoint.

    Use it to test a script before you deploy it. INPUT is a file or a folder; files in its subfolders are ignored.
    Worker processes receive the files in mini-batches. Each worker has a temporary working folder, its own GPU if
    there are enough, a log in OUT/logs/azureml, and your environment variables. The rows that run() returns are written
    to OUT/predictions.csv, which replaces the file of an earlier job.

    A mini-batch is retried if run() raises an exception, returns neither a list nor a DataFrame, or takes too long, or
    if the worker dies. --kill and --duplicate make some mini-batches run more than once. The files that a correct
    script writes do not change, but --duplicate repeats rows in predictions.csv.

    Exit codes: 0 success; 2 usage; 3 if Azure would report the job as failed; 75 interrupted.
    """
    from batch_infer.simulation import DEFAULT_SCRIPT, SimulationSettings, simulate

    append_rows = options.pop("output_action") == "append_row"
    script = options.pop("script") or DEFAULT_SCRIPT
    settings = SimulationSettings(script=script, append_rows=append_rows, **options)
    progress = SimulationProgress(shown=not (quiet or no_progress))
    with stoppable(hint=NOTHING_KEPT), closing(progress):
        outcome = simulate(settings, progress)
    if outcome.fault is not None or not quiet:
        print_result(_outcome_lines(outcome), outcome.as_dict() if as_json else None)
    return 0 if outcome.fault is None else JOB_FAILED


class SimulationProgress:
    """If `shown`, shows a bar (see shows_bar) or logs at most one line per LOG_INTERVAL. Otherwise does nothing."""

    def __init__(self, *, shown: bool) -> None:
        self._shown, self._logged_at = shown, time.monotonic()
        self._bar: tqdm[Any] | None = None

    def __call__(self, outcome: SimulationOutcome) -> None:
        if not self._shown:
            return
        if shows_bar():
            self._bar = self._bar or tqdm(total=outcome.mini_batches, unit="mini-batch", dynamic_ncols=True)
            self._bar.set_postfix_str(f"{format_count(outcome.rows, 'row')}, {outcome.failed} failed", refresh=False)
            self._bar.update(outcome.settled - self._bar.n)
        elif (now := time.monotonic()) - self._logged_at >= LOG_INTERVAL:
            self._logged_at = now
            counts = {"settled": outcome.settled, "mini_batches": outcome.mini_batches, "rows": outcome.rows}
            log.info("%(settled)d of %(mini_batches)d mini-batches, %(rows)d rows", counts, extra=counts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _outcome_lines(outcome: SimulationOutcome) -> Iterator[str]:
    yield (
        f"{format_count(outcome.mini_batches, 'mini-batch', 'mini-batches')} of "
        f"{format_count(outcome.files, 'file')} · {outcome.succeeded:,} succeeded, {outcome.failed:,} failed; "
        f"{format_count(outcome.failed_files, 'file')} failed"
    )
    events = [
        (outcome.retries, "retry", "retries"),
        (outcome.duplicates, "duplicate", "duplicates"),
        (outcome.kills, "killed", "killed"),
        (outcome.kills_missed, "missed kill", "missed kills"),
        (outcome.timeouts, "timed out", "timed out"),
        (outcome.deaths, "death", "deaths"),
    ]
    deliveries = format_count(outcome.deliveries, "delivery", "deliveries")
    yield " · ".join([deliveries, *(format_count(*event) for event in events if event[0])])
    if (rate := outcome.rows_per_second) is not None:
        running, total = format_duration(outcome.running_seconds), format_duration(outcome.seconds)
        yield f"{format_count(outcome.rows, 'row')} in {running} ({rate:.2f} rows/s), {total} in all"
    if outcome.predictions is not None:
        yield f"rows     {outcome.predictions}"
    yield f"logs     {outcome.logs}"
    if outcome.fault is not None:
        yield from f"the job failed: {outcome.fault}".split("\n")


@command(click.Argument(["folder"], metavar="DIR", type=PATH), *model_options, *compute_options, name="export-mlflow")
def export_mlflow(*, folder: Path, quiet: bool, **options: Any) -> int:
    """Write a model to DIR in MLflow's format.

    The MLflow model can be deployed without a scoring script. DIR contains the model's files, batch-infer itself and a
    signature. The input is a DataFrame with a column `prompt`. The output is a DataFrame with prompt, generated_image
    (a file in base64), nsfw_content_detected and, for rows without an image, error. Each call can set the parameters
    num_inference_steps, guidance_scale, height, width, seed and negative_prompt. Variables such as BATCH_INFER_SAFETY
    are read when the model is loaded.

    Exit codes: 0 success; 2 usage, or DIR is not empty; 75 interrupted.
    """
    if find_spec("mlflow") is None:
        raise SettingsError(f"export-mlflow needs mlflow: {install_command('mlflow')}")
    with stoppable(hint=NOTHING_KEPT):
        # This slow import is done here so that a signal during it stops the command cleanly.
        from batch_infer.jobs import export_model

        card = export_model(folder.expanduser(), make_model_settings(options), make_compute_settings(options))
    if not quiet:
        print_result([f"{folder}: {card.title}, as an MLflow model"])
    return 0
