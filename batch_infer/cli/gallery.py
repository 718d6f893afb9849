"""`batch-infer gallery`: make a page for looking through the images of OUT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, get_args

import click

from batch_infer.cli.logs import log
from batch_infer.cli.options import check_time_limit_option, command, json_option, option, out_argument, progress_option
from batch_infer.cli.progress import CheckProgress
from batch_infer.cli.report import format_count, line, print_result, stoppable
from batch_infer.cli.values import POSITIVE, parse_out
from batch_infer.errors import BatchInferError, LockedError
from batch_infer.records import Status
from batch_infer.stopping import GRACE_SECONDS, StopRequested, deferred
from batch_infer.terminal import quote_command

if TYPE_CHECKING:
    from batch_infer.jobs import Gallery

gallery_option = option(
    "--gallery",
    is_flag=True,
    help="At the end, make or update the page of `batch-infer gallery OUT`, unless the run was stopped. An error in "
    "this does not change the exit code.",
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


def update_gallery(out: str, stop: Callable[[], bool]) -> bool:
    """Make or update OUT/gallery at the end of a run, and return whether it is up to date.

    Nothing that goes wrong ends the caller: a warning says that the gallery is not updated, or a bug's traceback is
    logged. After a stop, nothing is done, because a run must end within seconds.
    """
    again = quote_command("gallery", out)
    with deferred(GRACE_SECONDS):
        try:
            for text in gallery_lines(_make_unless_stopped(out, stop), out):
                log.info("%s", text)
        except StopRequested:
            log.warning("the gallery is not updated, because the command was stopped: run %s to make it", again)
        except LockedError:
            log.warning("the gallery is not updated, because another command is making it: run %s after that", again)
        except (BatchInferError, OSError) as error:
            log.warning("the gallery is not updated: %s; run %s to make it later", error, again)
        except Exception:  # noqa: BLE001  # the run is complete, so its exit code must not be that of a bug
            log.exception("the gallery is not updated because of a bug; the results are complete")
        else:
            return True
    return False


def _make_unless_stopped(out: str, stop: Callable[[], bool]) -> Gallery:
    """Make the gallery. Raises StopRequested if `stop` returns true before or between two results."""

    def check(done: int, total: int) -> None:
        if stop():
            raise StopRequested

    check(0, 0)
    from batch_infer.jobs import make_gallery

    return make_gallery(out, on_progress=check, shown_out=out)


def gallery_lines(result: Gallery, out: str) -> Iterator[str]:
    """Yield the lines that describe a gallery."""
    yield line("gallery", result.path)
    kept = f", {result.kept:,} kept" if result.kept else ""
    yield f"{format_count(result.results, 'result')} · {format_count(result.made, 'thumbnail')} made{kept}"
    if result.left_out:
        left_out = format_count(result.left_out, "result")
        yield f"{left_out} left out by --max-results or --only-status: give a larger number or other statuses"
    if result.unreadable:
        retry = quote_command("retry", out, "--status", "missing", "--status", "damaged")
        yield f"{format_count(result.unreadable, 'image')} missing or damaged: {retry} renders them again"
