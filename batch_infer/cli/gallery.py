"""`batch-infer gallery`: make a page for looking through the images of OUT."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, get_args

import click

from batch_infer.cli.logs import log
from batch_infer.cli.options import (
    POSITIVE,
    check_time_limit_option,
    command,
    json_option,
    option,
    out_argument,
    parse_out,
    progress_option,
)
from batch_infer.cli.progress import CheckProgress
from batch_infer.cli.report import format_count, print_result, stoppable
from batch_infer.errors import BatchInferError, StoppedError
from batch_infer.records import Status
from batch_infer.stopping import GRACE_SECONDS, StopRequested, deferred

if TYPE_CHECKING:
    from batch_infer.jobs import Gallery

QUICK_SECONDS = 2.0
"""Number of seconds for the gallery of a run that a signal or the time limit stopped."""
gallery_option = option(
    "--gallery",
    is_flag=True,
    help="At the end, make or update the page of `batch-infer gallery OUT`. An error in this does not change the exit "
    "code.",
)
"""The option of `run` and `retry`."""
THUMBNAIL_SIZES = click.IntRange(32, 1024)


@command(
    out_argument,
    option(
        "--to",
        metavar="DIR",
        callback=lambda _context, _parameter, value: None if value is None else parse_out(value),
        help="Write a gallery that can be copied and opened without OUT, with previews of the images, to this folder. "
        "Use it for a private bucket. Default: OUT/gallery, which links to the images of OUT.",
    ),
    option(
        "--max-results",
        type=POSITIVE,
        default=100_000,
        metavar="N",
        help="Show only the first N results. The page keeps all rows in memory.",
    ),
    option(
        "--only-status",
        "statuses",
        envvar="BATCH_INFER_ONLY_STATUS",
        type=click.Choice(get_args(Status)),
        multiple=True,
        help="Show only results with this status. Repeatable.",
    ),
    option(
        "--thumbnail-size",
        type=THUMBNAIL_SIZES,
        default=256,
        metavar="PX",
        help="Longer side of the thumbnails. They are never larger than their images.",
    ),
    option(
        "--thumbnail-threads",
        type=POSITIVE,
        metavar="N",
        help="Threads that make thumbnails. Default: one per core, and at least 16 for an object store.",
    ),
    check_time_limit_option,
    json_option,
    progress_option,
)
def gallery(
    *,
    out: str,
    to: str | None,
    max_results: int,
    statuses: tuple[Status, ...],
    thumbnail_size: int,
    thumbnail_threads: int | None,
    time_limit: float | None,
    as_json: bool,
    no_progress: bool,
    quiet: bool,
) -> int:
    """Make a page for looking through the images of OUT: OUT/gallery/index.html.

    Open the page in a browser: it needs no server and no network. It shows the images and results with filters, sorting
    and charts, and exports ratings as a table for `retry --ids`. Run the command again to update it: thumbnails of
    unchanged images are kept. OUT may be of a run that is active or was stopped.

    Thumbnails of flagged images are blurred. A missing or damaged image does not end the command.

    Exit codes: 0 success; 2 usage, or OUT contains no run; 75 stopped by a signal or --time-limit, or another command
    is making the same gallery (run the same command again to continue).
    """
    hint = "the old page is unchanged. Run the same command again to continue"
    shown = not (quiet or no_progress)
    with stoppable(time_limit, hint=hint) as stop, closing(CheckProgress("image", "added", shown=shown)) as progress:
        from batch_infer.jobs import GalleryOptions, make_gallery

        def report(done: int, total: int) -> None:
            progress(done, total)
            if stop():
                raise stop.error()

        options = GalleryOptions(to, max_results, statuses, thumbnail_size, thumbnail_threads)
        result = make_gallery(out, options, report, out)
    if not quiet:
        print_result(gallery_lines(result, out), result.as_dict() if as_json else None)
    return 0


def update_gallery(out: str, stop: Callable[[], bool]) -> None:
    """Make or update OUT/gallery at the end of a run. Log a warning if that fails or there is no time.

    After a stop, this takes at most QUICK_SECONDS.
    """
    deadline = time.monotonic() + QUICK_SECONDS if stop() else math.inf

    def check(done: int, total: int) -> None:
        if time.monotonic() > deadline or (deadline == math.inf and stop()):
            raise StoppedError("there was no time")

    try:
        with deferred(GRACE_SECONDS):
            from batch_infer.jobs import make_gallery

            result = make_gallery(out, on_progress=check, shown_out=out)
    except (BatchInferError, OSError, StopRequested) as error:
        reason = "it was stopped" if isinstance(error, StopRequested) else error
        log.warning("the gallery is not updated: %s; run `batch-infer gallery %s`", reason, out)
        return
    for line in gallery_lines(result, out):
        log.info("%s", line)


def gallery_lines(result: Gallery, out: str) -> Iterator[str]:
    """Yield the lines that describe a gallery."""
    yield f"gallery  {result.path}"
    kept = f", {result.kept:,} kept" if result.kept else ""
    yield f"{format_count(result.results, 'result')} · {format_count(result.made, 'thumbnail')} made{kept}"
    if result.left_out:
        left_out = format_count(result.left_out, "result")
        yield f"{left_out} left out by --max-results or --only-status: give a larger number or other statuses"
    if result.unreadable:
        yield (
            f"{format_count(result.unreadable, 'image')} missing or damaged: `batch-infer retry {out} --status missing "
            "--status damaged` renders them again"
        )
