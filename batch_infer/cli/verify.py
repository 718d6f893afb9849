"""`batch-infer verify`: check that every row is accounted for, and that every file is whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, NoReturn

import click
from tqdm import tqdm

from batch_infer.cli.logs import log
from batch_infer.cli.options import (
    command,
    json_option,
    moved_tables_argument,
    option,
    out_argument,
    parse_duration,
    progress_option,
)
from batch_infer.cli.progress import LOG_INTERVAL, make_progress, shows_bar
from batch_infer.cli.report import ROWS_FAILED, format_count, print_result, stoppable

if TYPE_CHECKING:
    from batch_infer.jobs import Problem, Sample, Verification

MAX_LINES = 20
"""Maximum number of problems to print as text."""


@command(
    out_argument,
    moved_tables_argument,
    option("--quick", is_flag=True, help="Compare only the names and sizes of image files, without reading them."),
    option(
        "--public-key",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Also check that this Ed25519 key signed OUT (see `run --sign-key`). Needs pip install "
        "'batch-infer[sign]'.",
    ),
    option(
        "--fix",
        is_flag=True,
        help="Mark the rows of missing and damaged images as failed, so that `run` renders them again. No image is "
        "changed or removed.",
    ),
    option(
        "--sample",
        "sample_size",
        type=click.IntRange(min=1),
        default=None,
        metavar="N",
        help="Also render N images again with the model and the settings of the run, and compare them.",
    ),
    option("--seed", "sample_seed", type=click.IntRange(min=0), default=0, help="Chooses the images of --sample."),
    option(
        "--time-limit",
        type=parse_duration,
        metavar="DURATION",
        help="Stop after this long, as on SIGTERM, with exit code 75: 90s, 30m, 2h, 1h30m, 1d, or seconds.",
    ),
    json_option,
    progress_option,
)
def verify(
    *,
    out: str,
    tables: tuple[str, ...],
    quick: bool,
    public_key: str | None,
    fix: bool,
    sample_size: int | None,
    sample_seed: int,
    time_limit: float | None,
    as_json: bool,
    no_progress: bool,
    quiet: bool,
) -> int:
    """Check that every row of OUT is accounted for, and that every file is whole.

    Reads all manifest parts, results.* and images, and compares them with each other, with the SHA-256 of each image
    and with OUT/manifest/SHA256SUMS. Every row of the run's tables must have a result; name TABLE... if the tables
    were moved. Without --fix, nothing is written.

    The kinds of problems are missing_row, duplicate_row, missing_image, truncated_image, wrong_image, orphan_image,
    damaged_part, results_differ and, with --sample, not_reproduced. Those of images need --fix and `run`, or
    `retry --status missing --status damaged`. `run` also renders missing rows and those of parts that cannot be
    read, and `merge` writes results.* again.

    Exit codes: 0 no problems; 2 usage, or OUT contains no run; 3 problems, also if --fix has marked them; 75
    interrupted, or another command is using OUT.
    """
    hint = "the verification is incomplete. Run the same command again"
    shown = not (quiet or no_progress)
    with stoppable(time_limit, hint=hint) as stop, closing(_Progress(shown=shown)) as progress:
        from batch_infer.jobs import VerifyOptions, verify_run

        options = VerifyOptions(tables, quick, public_key, fix, sample_size or 0, sample_seed)
        result = verify_run(out, options, progress.report, make_progress(shown=shown), stop)
    code = ROWS_FAILED if result.counts else 0
    if code or not quiet:
        print_result(_lines(result, out), result.as_dict() if as_json else None)
    return code


def _lines(result: Verification, out: str) -> Iterator[str]:
    counts = [f"{count:,} {kind}" for kind, count in result.counts.items()]
    yield " · ".join(
        [
            format_count(result.rows, "row"),
            format_count(result.images, "image"),
            f"{result.checked:,} read",
            *(counts or ["no problems"]),
        ]
    )
    yield from (f"  {_format_problem(problem)}" for problem in result.problems[:MAX_LINES])
    if more := sum(result.counts.values()) - len(result.problems[:MAX_LINES]):
        yield f"  and {more:,} more"
    if result.sample is not None:
        yield from _sample_lines(result.sample)
    if result.fixed:
        yield (
            f"{format_count(result.fixed, 'result')} marked as failed: `batch-infer run`, or `batch-infer retry {out} "
            "--status failed`, renders them again"
        )
    if result.counts.keys() & {"missing_row", "damaged_part"}:
        yield "`batch-infer run` renders missing rows, and those of parts that cannot be read, again"


def _sample_lines(sample: Sample) -> Iterator[str]:
    yield f"{format_count(sample.rendered, 'image')} rendered again: {sample.equal_bytes:,} with equal bytes"
    if sample.environment:
        names = ", ".join(f"{name} {old} then, {new} now" for name, (old, new) in sample.environment.items())
        yield f"pixels were compared, because the bytes may differ: {names}"
    if sample.largest is not None:
        yield f"largest difference of a channel {sample.largest} of 255, lowest PSNR {sample.psnr_min:.2f} dB"


def _format_problem(problem: Problem) -> str:
    image = f", image {problem.image_index}" if problem.image_index else ""
    names = [problem.path, problem.id and f"({problem.id}{image})"]
    return f"{' '.join([problem.kind, *filter(None, names)])}: {problem.detail}"


class _Progress:
    """Shows how many images were checked: a bar on a terminal, otherwise log lines."""

    def __init__(self, *, shown: bool) -> None:
        self._shown, self._logged = shown, time.monotonic()
        self._bar: tqdm[NoReturn] | None = None

    def report(self, done: int, total: int) -> None:
        if not self._shown:
            return
        if shows_bar():
            self._bar = self._bar or tqdm(total=total, unit="image", dynamic_ncols=True)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() >= self._logged + LOG_INTERVAL:
            self._logged = time.monotonic()
            log.info(
                "%s of %s checked", f"{done:,}", format_count(total, "image"), extra={"done": done, "total": total}
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
