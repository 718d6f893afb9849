"""Commands on an existing OUT that do not render: `batch-infer status`, `merge` and `rescore`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from batch_infer.cli.logs import log
from batch_infer.cli.options import (
    c2pa_options,
    command,
    json_option,
    moved_tables_argument,
    on_flagged_option,
    option,
    out_argument,
    results_options,
    sign_key_option,
)
from batch_infer.cli.report import (
    CHECK_FAILED,
    format_count,
    format_counts,
    format_duration,
    format_rate,
    format_results,
    line,
    print_result,
    stoppable,
)
from batch_infer.cli.settings import make_safety_settings
from batch_infer.cli.summary import Place, progress_lines, report_lines
from batch_infer.settings import ResultsFormat, make_signer
from batch_infer.terminal import quote_command

if TYPE_CHECKING:
    from batch_infer.jobs import Counts, RescoreCounts, RunStatus


@command(out_argument, json_option)
def status(*, out: str, as_json: bool, quiet: bool) -> int:
    """Show the state and the progress of the run in OUT.

    The run may be active, stopped or finished. The output counts the results by status, and those that are left. A row
    has one result per image. Results that a killed run committed are included. For an active run, status also shows
    the speed, the time left, and what needs attention; for a run that has ended, everything that `run` printed.

    Exit codes: 0 success; 2 if OUT contains no run. With -q, only errors are printed.
    """
    from batch_infer.jobs import read_status

    run_status = read_status(out)
    if not quiet:
        print_result(_status_lines(run_status, out), run_status.as_dict() if as_json else None)
    return 0


def _status_lines(run: RunStatus, out: str) -> Iterator[str]:
    yield f"{out}: {run.state}{f' by {run.holder}' if run.holder else f', started {run.started_at[:16]} UTC'}"
    place = Place.of(run.settings, out, run.gallery) if run.settings else Place(out)
    summary = run.summary
    if summary is not None and run.has_ended:
        yield from report_lines(summary, place)
    else:
        yield _format_progress(run)
        if run.images_per_second and run.seconds_left is not None:
            left = format_duration(run.seconds_left)
            yield line("speed", f"{format_rate(run.images_per_second)}, about {left} left")
        if summary is not None:
            yield from progress_lines(summary, place)
        if run.gallery is not None:
            yield line("gallery", run.gallery)
    if run.is_stale:
        yield f"results.* are out of date: run {quote_command('merge', out)} to update them"
    if run.state == "stopped":
        yield "run the same command again to continue"
    if run.state == "unknown":
        yield f"the lock of {out} cannot be read, so it is unknown whether a run is active"
    if run.state == "rescoring" and not run.holder:
        yield "a rescore is unfinished: run the same `batch-infer rescore` again to continue"


def _format_progress(run: RunStatus) -> str:
    """Format the results by status, and how many are left."""
    counts = [f"{count:,} {name}" for name, count in run.counts.items() if count or name in ("ok", "failed")]
    if run.remaining is not None:
        done = sum(run.counts.values())
        share = f" ({100 * done // (done + run.remaining)}% done)" if done and run.remaining else ""
        counts.append(f"{run.remaining:,} left{share}")
    elif run.state == "open":
        counts.append("total unknown (Azure ML endpoint output)")
    else:
        counts.append("the tables are being scanned" if run.holder else "total unknown")
    return " · ".join(counts)


@command(out_argument, *results_options, sign_key_option, json_option)
def merge(
    *,
    out: str,
    results: tuple[ResultsFormat, ...],
    base64: bool,
    sign_key: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Write OUT/results.* from OUT's manifest.

    The results are in table order. `run` merges at its end; use `merge` after a run was killed, and for the output of
    a batch endpoint. It merges only rows of the tables that run.json names, or all rows of the manifest if these
    tables cannot be read or OUT is from an endpoint. It writes the formats of the run and those of --results.

    Exit codes: 0 success; 2 usage, or OUT contains no run; 75 interrupted, or another command is using OUT.
    """
    with stoppable(hint="results.* are unchanged. Run the same command again"):
        from batch_infer.jobs import merge_results

        counts, formats = merge_results(out, results, base64=base64, sign_key=sign_key)
    if not quiet:
        lines = [format_counts(counts), format_results(out, formats)]
        if counts.remaining:
            lines.append(f"{counts.remaining:,} left: run again to continue")
        print_result(lines, counts.as_dict() if as_json else None)
    return 0


@command(
    out_argument,
    moved_tables_argument,
    option(
        "--safety",
        type=click.Choice(["checker", "azure", "checker,azure"]),
        required=True,
        help="Check with the model's own checker, with Azure AI Content Safety, or with both.",
    ),
    on_flagged_option,
    *c2pa_options,
    json_option,
)
def rescore(*, out: str, tables: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> int:
    """Check the stored images of OUT again, without rendering them.

    Use it to change the checker, its thresholds or --on-flagged; `run` with the same --safety continues from there.
    blank, blur and drop destroy the originals of flagged images; a warning says so first. The service checks prompts
    too: an image is flagged if the service refuses its prompt. A flagged image that was blanked, blurred or dropped
    cannot be checked again: it stays flagged, its error says so, and `retry --status flagged` renders it. An image
    fails if it is missing or damaged, or if it alone gets no answer from the checker. `run` then renders failed images
    and prompts that are no longer blocked. No image is lost if rescore is killed: run the same command again to
    continue.

    Exit codes: 0 success; 2 usage or settings; 3 images failed; 75 stopped, or the service is down (run the same
    command again to continue).
    """

    def log_progress(result: RescoreCounts) -> None:
        log.debug("%s checked", format_count(result.checked, "image"))

    with stoppable() as stop:
        from batch_infer.jobs import rescore_images

        safety = make_safety_settings({**options, "require_safety": True})
        signer = make_signer(options["c2pa_cert"], options["c2pa_key"])
        result, counts = rescore_images(out, tables, safety, log_progress, stop, signer)
    code = CHECK_FAILED if result.failed else 0
    if code or not quiet:
        data = {**result.as_dict(), "counts": counts.as_dict()} if as_json else None
        print_result(_rescore_lines(result, counts), data)
    return code


def _rescore_lines(result: RescoreCounts, counts: Counts) -> Iterator[str]:
    moved = f", {result.moved:,} moved or replaced" if result.moved else ""
    checked = format_count(result.checked, "image")
    yield f"{checked} checked: {result.flagged:,} flagged, {result.changed:,} changed{moved}"
    if result.unchecked:
        yield f"{result.unchecked:,} flagged earlier cannot be checked again: their images were not kept"
    if result.failed:
        yield f"{result.failed:,} failed: `batch-infer run` renders them"
    yield format_counts(counts)
    if counts.remaining:
        yield f"{counts.remaining:,} left: `batch-infer run` renders them"
