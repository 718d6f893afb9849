"""`batch-infer diff`: compare the results of two runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from batch_infer.cli.logs import log
from batch_infer.cli.options import command, json_option, option, parse_duration, parse_out, progress_option
from batch_infer.cli.progress import LOG_INTERVAL, shows_bar
from batch_infer.cli.report import NOTHING_KEPT, format_count, print_result, stoppable

if TYPE_CHECKING:
    from batch_infer.jobs import Diff

DIFFERENT = 3
"""Exit code if results differ."""
PRINTED_DIFFERENCES = 20
"""Number of results to list in the text output. --json lists more."""


class _ComparisonProgress:
    """Shows how many results are compared: as a bar on a terminal, otherwise as log lines."""

    def __init__(self, *, shown: bool) -> None:
        self._shown, self._logged_at = shown, time.monotonic()
        self._bar: tqdm[Any] | None = None
        if shown and shows_bar():
            self._bar = tqdm(desc="reading the manifests", unit=" results", dynamic_ncols=True)
        elif shown:
            log.info("reading the manifests")

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_description("comparing", refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._shown and time.monotonic() - self._logged_at >= LOG_INTERVAL:
            self._logged_at = time.monotonic()
            log.info("%d of %d results compared", done, total, extra={"done": done, "total": total})

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _make_out_argument(name: str) -> click.Argument:
    return click.Argument([name], metavar=name.upper(), callback=lambda _context, _parameter, value: parse_out(value))


@command(
    _make_out_argument("out_a"),
    _make_out_argument("out_b"),
    option(
        "--time-limit",
        type=parse_duration,
        metavar="DURATION",
        help="Stop after this long, with exit code 75: 90s, 30m, 2h, 1h30m, 1d, or seconds.",
    ),
    json_option,
    progress_option,
)
def diff(*, out_a: str, out_b: str, time_limit: float | None, as_json: bool, no_progress: bool, quiet: bool) -> int:
    """Compare the results of two runs.

    Results with the same id and image index are compared: their status, the settings and cells with which they were
    made, and the bytes and pixels of their images. Columns that differ between equal runs, such as seconds and worker,
    are ignored. Images are read only if the hashes in the manifests differ. Nothing is written.

    Settings, devices and versions of the two runs that differ are shown, but do not count as differences by themselves.

    Exit codes: 0 all results are equal; 2 usage, or one OUT contains no run; 3 results differ; 75 stopped.
    """
    with stoppable(time_limit, hint=NOTHING_KEPT) as stop:
        from batch_infer.jobs import diff_runs

        with closing(_ComparisonProgress(shown=not (quiet or no_progress))) as progress:
            result = diff_runs(out_a, out_b, progress, stop)
    code = 0 if result.is_equal else DIFFERENT
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
        yield f"different {', '.join(parts)}"
    if diff.largest is not None:
        yield f"largest difference of a channel {diff.largest} of 255, lowest PSNR {diff.psnr_min:.2f} dB"
    if diff.settings.columns:
        columns = sorted(diff.settings.columns.items(), key=lambda item: -item[1])
        yield f"different columns: {', '.join(f'{name} ({count:,})' for name, count in columns)}"
    if diff.settings.run:
        yield "different settings:"
        yield from (f"  {name}: {_to_text(a)} in A, {_to_text(b)} in B" for name, (a, b) in diff.settings.run.items())
    yield from _difference_lines(diff)


def _difference_lines(diff: Diff) -> Iterator[str]:
    for difference in diff.differences[:PRINTED_DIFFERENCES]:
        image = f", image {difference.image_index}" if difference.image_index else ""
        yield f"{difference.id}{image}: {difference.detail}"
    if more := diff.different - min(len(diff.differences), PRINTED_DIFFERENCES):
        yield f"and {more:,} more; --json lists up to 1,000"


def _to_text(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
