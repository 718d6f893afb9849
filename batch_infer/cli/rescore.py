"""`batch-infer rescore`: check stored images again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batch_infer.cli.logs import log
from batch_infer.cli.options import command, json_option, on_flagged_option, option, out_argument
from batch_infer.cli.report import ROWS_FAILED, format_count, format_counts, print_result, stoppable
from batch_infer.cli.settings import make_safety_settings

if TYPE_CHECKING:
    from batch_infer.jobs import Counts, RescoreCounts


@command(
    out_argument,
    click.argument("tables", metavar="[TABLE...]", nargs=-1),
    option(
        "--safety",
        type=click.Choice(["checker", "azure", "checker,azure"]),
        required=True,
        help="What checks the images: the model's own checker, Azure AI Content Safety, or both.",
    ),
    on_flagged_option,
    json_option,
)
def rescore(*, out: Path, tables: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> int:
    """Check the stored images of OUT again, without rendering.

    Use it to change the checker, its thresholds or --on-flagged; `run` with the same --safety continues from there.
    blank, blur and drop destroy the originals of flagged images, which a warning says first. The service checks
    prompts too: an image whose prompt it refuses is flagged. A flagged image that was blanked, blurred or dropped
    cannot be checked again: it stays flagged, its error says so, and `retry --status flagged` renders it. An image
    that is missing or damaged, or that gets no answer, fails and is left to `run`, as is a prompt that is no longer
    blocked. No image is lost if rescore is killed: run the same command again to continue.

    Exit codes: 0; 2 usage or settings; 3 if some failed; 75 stopped, or the service is down: run again to continue.
    """

    def log_progress(result: RescoreCounts) -> None:
        log.debug("%s checked", format_count(result.checked, "image"))

    with stoppable() as stop:
        from batch_infer.jobs import rescore_images

        safety = make_safety_settings({**options, "require_safety": True})
        result, counts = rescore_images(out, tables, safety, log_progress, stop)
    code = ROWS_FAILED if result.failed else 0
    if code or not quiet:
        print_result(_lines(result, counts), {**result.as_dict(), "counts": counts.as_dict()} if as_json else None)
    return code


def _lines(result: RescoreCounts, counts: Counts) -> Iterator[str]:
    yield f"{format_count(result.checked, 'image')} checked: {result.flagged:,} flagged, {result.changed:,} changed"
    if result.unchecked:
        yield f"{result.unchecked:,} flagged earlier cannot be checked again: their images were not kept"
    if result.failed:
        yield f"{result.failed:,} failed: `batch-infer run` renders them"
    yield format_counts(counts)
    if counts.remaining:
        yield f"{counts.remaining:,} left: `batch-infer run` renders them"
