"""`batch-infer diff`: compare the results of two runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from batch_infer.cli.options import check_time_limit_option, command, json_option, progress_option
from batch_infer.cli.progress import CheckProgress
from batch_infer.cli.report import (
    CHECK_FAILED,
    MAX_PRINTED,
    NOTHING_KEPT,
    format_count,
    format_pixel_differences,
    print_result,
    stoppable,
)
from batch_infer.cli.shells import argument
from batch_infer.cli.values import parse_out

if TYPE_CHECKING:
    from batch_infer.jobs import Diff


def _make_out_argument(name: str) -> click.Argument:
    return argument(name, name.upper(), callback=lambda _context, _parameter, value: parse_out(value))


@command(
    _make_out_argument("out_a"),
    _make_out_argument("out_b"),
    check_time_limit_option,
    json_option,
    progress_option,
)
def diff(*, out_a: str, out_b: str, time_limit: float | None, as_json: bool, no_progress: bool, quiet: bool) -> int:
    """Compare the results of two runs.

    Results with the same id and image index are compared: their status, the settings and cells with which they were
    made, and the bytes and pixels of their images. Columns that differ between equal runs, such as seconds and worker,
    are ignored. Images are read only if the hashes in the manifests differ. Nothing is written.

    Settings, devices and versions of the two runs that differ are shown, but do not count as differences by themselves.

    Exit codes: 0 all results are equal; 2 usage, or an OUT contains no run or a damaged manifest part; 3 results
    differ; 75 stopped, or an active run replaced manifest parts (run the same command again).
    """
    with stoppable(time_limit, hint=NOTHING_KEPT) as stop:
        from batch_infer.jobs import diff_runs

        with closing(CheckProgress("result", "compared", shown=not (quiet or no_progress))) as progress:
            result = diff_runs(out_a, out_b, progress, stop)
    code = 0 if result.is_equal else CHECK_FAILED
    if code or not quiet:
        print_result(_diff_lines(result, out_a, out_b), result.as_dict() if as_json else None)
    return code


def _diff_lines(diff: Diff, out_a: str, out_b: str) -> Iterator[str]:
    yield f"A  {out_a}"
    yield f"B  {out_b}"
    yield f"{format_count(diff.rows, 'result')} in both: {diff.equal:,} equal, {diff.rows - diff.equal:,} different"
    for name, count in (("A", diff.only_a), ("B", diff.only_b)):
        if count:
            yield f"{format_count(count, 'result')} only in {name}"
    counts = {"status": diff.status, "bytes": diff.bytes, "pixels": diff.pixels}
    if parts := [f"{count:,} in {name}" for name, count in counts.items() if count]:
        yield f"differences: {', '.join(parts)}"
    if diff.largest is not None and diff.psnr_min is not None:
        yield format_pixel_differences(diff.largest, diff.psnr_min)
    if diff.settings.columns:
        columns = sorted(diff.settings.columns.items(), key=lambda item: -item[1])
        yield f"different columns: {', '.join(f'{name} ({count:,})' for name, count in columns)}"
    if diff.settings.run:
        yield "different settings:"
        yield from (f"  {name}: {_to_text(a)} in A, {_to_text(b)} in B" for name, (a, b) in diff.settings.run.items())
    yield from _difference_lines(diff)


def _difference_lines(diff: Diff) -> Iterator[str]:
    for difference in diff.differences[:MAX_PRINTED]:
        image = f", image {difference.image_index}" if difference.image_index else ""
        yield f"{difference.id}{image}: {difference.detail}"
    if more := diff.difference_count - min(len(diff.differences), MAX_PRINTED):
        yield f"and {more:,} more; --json lists more of them"


def _to_text(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
