"""`batch-infer run` and `batch-infer retry`: render tables of prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import click

from batch_infer.cli.gallery import gallery_option, update_gallery
from batch_infer.cli.job_options import job_options
from batch_infer.cli.metrics import Metrics
from batch_infer.cli.options import (
    c2pa_options,
    command,
    json_option,
    moved_tables_argument,
    option,
    out_argument,
    progress_option,
    unattended_options,
)
from batch_infer.cli.progress import ProgressGroup, make_progress
from batch_infer.cli.report import CHECK_FAILED, log_time_limit, print_result, stoppable
from batch_infer.cli.settings import make_run_settings
from batch_infer.cli.summary import Place, summary_lines
from batch_infer.cli.values import SemicolonList
from batch_infer.errors import StoppedError
from batch_infer.settings import RetryStatus, make_signer

if TYPE_CHECKING:
    from batch_infer.jobs import Summary
    from batch_infer.settings import RunSettings
    from batch_infer.stopping import Stopper

RenderFunction: TypeAlias = "Callable[[ProgressGroup, Stopper], tuple[Summary, RunSettings] | None]"


@command(*job_options, json_option, progress_option)
def run(*, time_limit: float | None, metrics_file: Path | None, **options: Any) -> int:
    """Render the prompts of TABLE... into OUT.

    TABLE is a file (.csv, .tsv, .parquet, .pq, .parq, .jsonl, .ndjson, .json, .txt, .prompts.txt, each also .gz, .bz2,
    .xz or .zst), a folder of them, a glob in quotes, a URL (s3://, https://, ...), or - for standard input. The column
    `prompt` is required; id, negative_prompt, seed, height, width, num_inference_steps, guidance_scale,
    guidance_rescale, num_images_per_prompt and, with --lora-folder, lora are optional, and all other columns are
    carried through to the results.
    Folders named key=value in a file's path become columns too.

    Run the same command again to resume: it skips finished rows and renders new and changed ones.

    Every option can also be set by an environment variable: BATCH_INFER_STEPS=30 is --steps 30.

    Exit codes: 0 all rows accounted for; 2 usage or settings; 3 more rows failed or were invalid than --max-failed
    allows; 75 stopped early, for example by a signal, --time-limit or another run in OUT (run the same command again to
    continue); 1 a bug.
    """

    def render(progress: ProgressGroup, stop: Stopper) -> tuple[Summary, RunSettings] | None:
        settings = make_run_settings(options)
        from batch_infer.jobs import join_run, render_tables  # slow, so imported where a signal stops it cleanly

        return None if join_run(settings, stop) else (render_tables(settings, progress, stop), settings)

    return _execute(render, Metrics(metrics_file, options["out"], options["model"] or "demo"), time_limit, options)


@command(
    out_argument,
    moved_tables_argument,
    option(
        "--status",
        "statuses",
        envvar="BATCH_INFER_STATUS",
        type=click.Choice(get_args(RetryStatus)),
        multiple=True,
        help="Status of the rows to render. missing: the image file was deleted. damaged: the size or SHA-256 of "
        "the image file differs from its result; finding these reads all images. Repeatable.",
    ),
    option(
        "--id",
        "ids",
        type=SemicolonList(),
        metavar="ID",
        envvar="BATCH_INFER_ID",
        multiple=True,
        help="Id of a row to render, whatever its status. Repeatable; separate several in BATCH_INFER_ID with "
        "semicolons.",
    ),
    option(
        "--ids",
        "ids_file",
        envvar="BATCH_INFER_IDS",
        metavar="FILE",
        help="File of ids of rows to render: a table with a column id, as the page of `gallery` exports it, or a .txt "
        "file with one id per line. A column image_index selects single images. - is standard input.",
    ),
    *c2pa_options,
    gallery_option,
    *unattended_options,
    json_option,
    progress_option,
)
def retry(
    *,
    out: str,
    tables: tuple[str, ...],
    statuses: tuple[RetryStatus, ...],
    ids: tuple[str, ...],
    ids_file: str | None,
    time_limit: float | None,
    metrics_file: Path | None,
    **options: Any,
) -> int:
    """Render the rows of OUT with a given status or id again.

    At least one of --status, --id and --ids is required. With --status and ids, only rows with both are rendered.

    The tables and settings are those of the last run, from OUT/run.json; name TABLE... if the tables were moved. Rows
    are retried no matter how often they have failed. Other rows are not changed. To render rows that have no result
    yet, use `run`.

    Exit codes: as for `run`, except that rows without a result do not cause 75.
    """

    if ids_file == "":
        raise click.UsageError("--ids is empty: name a file or URL, or give - for standard input")
    if not (statuses or ids or ids_file):
        raise click.UsageError("give --status, --id or --ids to select the rows to render")

    def render(progress: ProgressGroup, stop: Stopper) -> tuple[Summary, RunSettings]:
        signer = make_signer(options["c2pa_cert"], options["c2pa_key"])
        from batch_infer.jobs import RetrySelection, retry_rows

        return retry_rows(out, RetrySelection(statuses, ids, ids_file), tables, progress, stop, signer)

    return _execute(render, Metrics(metrics_file, out), time_limit, options, is_retry=True)


def _execute(
    render: RenderFunction,
    metrics: Metrics,
    time_limit: float | None,
    options: dict[str, Any],
    *,
    is_retry: bool = False,
) -> int:
    """Render with progress and metrics, print the summary and return the exit code.

    `render` returns None on a launcher's higher ranks; rank 0 prints the summary.
    """
    quiet = options["quiet"]
    with stoppable(time_limit) as stop:
        with metrics:
            progress = make_progress(shown=not (quiet or options["no_progress"]))
            result = render(ProgressGroup(progress, metrics), stop)
            if result is None:
                return 0
            summary, settings = result
            metrics.model = settings.model.name or "demo"
            code = 0 if settings.max_failed.allows(summary.counts.bad_rows, summary.counts.rows) else CHECK_FAILED
            # After a retry, the remaining rows are left to `run`, so they do not change the exit code.
            if summary.unfinished or (summary.counts.remaining and not is_retry):
                code = StoppedError.exit_code
            metrics.conclude(summary, code)
        has_current_gallery = options["gallery"] and update_gallery(settings.out, stop)
    log_time_limit(stop, summary.unfinished)
    if code or not quiet:
        from batch_infer.jobs import find_gallery

        gallery = find_gallery(settings.out)
        data = {**summary.as_dict(), **({} if gallery is None else {"gallery": gallery})}
        has_new_images = summary.rendered > 0 and not has_current_gallery
        place = Place.of(settings, settings.out, gallery, has_new_images=has_new_images)
        print_result(summary_lines(summary, place), data if options["as_json"] else None)
    return code
