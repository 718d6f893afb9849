"""`batch-infer verify`: check that every row is accounted for, and that every file is whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import click

from batch_infer.cli.options import (
    check_time_limit_option,
    command,
    json_option,
    moved_tables_argument,
    option,
    out_argument,
    progress_option,
)
from batch_infer.cli.progress import CheckProgress, make_progress
from batch_infer.cli.report import (
    CHECK_FAILED,
    MAX_PRINTED,
    format_count,
    format_pixel_differences,
    print_result,
    stoppable,
)
from batch_infer.extras import install_command
from batch_infer.terminal import quote_command

if TYPE_CHECKING:
    from batch_infer.jobs import Problem, Sample, Verification

_EXCEPT_REMOVED = ", except those of rows that are no longer in the tables."
_REMEDIES = {
    "damaged_part": "See docs/verify.md about damaged_part first: other commands may replace results.*, which may be "
    "the only copy of some rows.",
    "missing_row": "Run `batch-infer run` with the same tables and options to render missing rows.",
    "results_differ": "Run {merge} to write results.* again.",
    "missing_image": "Run {missing} to render missing images again" + _EXCEPT_REMOVED,
    "truncated_image": "Run {damaged} to render damaged images again" + _EXCEPT_REMOVED,
    "wrong_image": "Run {damaged} to render damaged images again" + _EXCEPT_REMOVED,
    "not_reproduced": "{recipe} prints a script that reproduces an image with plain "
    "diffusers, to compare it with one that was not reproduced.",
    "orphan_image": "Orphan images belong to no result in the manifest: remove them if you do not need them.",
}
"""What to do about the kinds of problems."""


@command(
    out_argument,
    moved_tables_argument,
    option("--quick", is_flag=True, help="Compare only the names and sizes of image files, without reading them."),
    option(
        "--public-key",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help=f"Also check that this Ed25519 key signed OUT (see `run --sign-key`). Needs `{install_command('sign')}`.",
    ),
    option(
        "--fix",
        is_flag=True,
        help="Mark missing, damaged and (with --sample) not reproduced images as failed, so that `run` renders them "
        "again. Image files are not changed or removed.",
    ),
    option(
        "--sample",
        type=click.IntRange(min=1),
        metavar="N",
        help="Also render N images again with the model and the settings of the run, and compare them.",
    ),
    option("--seed", type=click.IntRange(min=0), help="Seed of the random choice of --sample.  [default: 0]"),
    check_time_limit_option,
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
    sample: int | None,
    seed: int | None,
    time_limit: float | None,
    as_json: bool,
    no_progress: bool,
    quiet: bool,
) -> int:
    """Check that every row of OUT is accounted for and that every file is intact.

    Compare the manifest parts, results.*, images and OUT/manifest/SHA256SUMS with each other and with the run's
    tables; name TABLE... if the tables were moved. Without --fix, nothing is written.

    The kinds of problems are missing_row, duplicate_row, missing_image, truncated_image, wrong_image, orphan_image,
    damaged_part, results_differ and, with --sample, not_reproduced. To render missing and damaged images again, use
    --fix and then `run`, or `retry --status missing --status damaged`. `run` renders missing rows and the rows of
    unreadable parts. `merge` writes results.* again.

    Exit codes: 0 no problems; 2 usage or settings, or OUT contains no run; 3 problems, even if --fix marked them; 75
    stopped by a signal or --time-limit, or another command is using OUT.
    """
    if seed is not None and sample is None:
        raise click.UsageError("--seed has no effect without --sample")
    hint = "the verification is incomplete. Run the same command again"
    shown = not (quiet or no_progress)
    with stoppable(time_limit, hint=hint) as stop, closing(CheckProgress("image", "checked", shown=shown)) as progress:
        from batch_infer.jobs import VerifyOptions, verify_run

        options = VerifyOptions(
            tables=tables,
            is_quick=quick,
            public_key=public_key,
            marks_failed=fix,
            sample_size=sample or 0,
            sample_seed=seed or 0,
        )
        result = verify_run(out, options, progress, make_progress(shown=shown), stop)
    code = CHECK_FAILED if result.counts else 0
    if code or not quiet:
        print_result(_lines(result, out), result.as_dict() if as_json else None)
    return code


def _lines(result: Verification, out: str) -> Iterator[str]:
    counts = [f"{count:,} {kind}" for kind, count in result.counts.items()]
    statuses = ", ".join(f"{count:,} {status}" for status, count in result.statuses.items())
    yield " · ".join(
        [
            format_count(result.rows, "row"),
            statuses or "no results",
            format_count(result.images, "image"),
            f"{result.checked:,} read",
            *(counts or ["no problems"]),
        ]
    )
    if result.root_digest is not None:
        yield f"root digest {result.root_digest}" + (", signed with this key" if result.is_signed else "")
    yield from (f"  {_format_problem(problem)}" for problem in result.problems[:MAX_PRINTED])
    if more := sum(result.counts.values()) - len(result.problems[:MAX_PRINTED]):
        yield f"  and {more:,} more; --json lists more of them"
    if result.sample is not None:
        yield from _sample_lines(result.sample)
    if result.marked_count:
        yield (
            f"{format_count(result.marked_count, 'result')} marked as failed. Run `batch-infer run` or "
            f"{quote_command('retry', out, '--status', 'failed')} to render them again."
        )
    yield from _find_remedies(result, out)


def _find_remedies(result: Verification, out: str) -> Iterator[str]:
    # Repeated and missing rows need another remedy in results.* than in the manifest.
    kinds = result.counts.keys() - {"missing_row", "duplicate_row"}
    for problem in result.problems:
        if problem.path is None:
            kinds.add(problem.kind)
        elif problem.kind in ("missing_row", "duplicate_row"):
            kinds.add("results_differ" if problem.path.startswith("results.") else "damaged_part")
    if "damaged_part" in kinds:
        yield _REMEDIES["damaged_part"]
        return
    if result.marked_count:
        kinds -= {"missing_image", "truncated_image", "wrong_image", "results_differ"}
    elif "failed" in result.statuses:
        yield f"Run {quote_command('retry', out, '--status', 'failed')} to render failed rows again."
    commands = {
        "merge": quote_command("merge", out),
        "missing": quote_command("retry", out, "--status", "missing"),
        "damaged": quote_command("retry", out, "--status", "damaged"),
        "recipe": quote_command("export-recipe", out, "ID"),
    }
    yield from dict.fromkeys(remedy.format(**commands) for kind, remedy in _REMEDIES.items() if kind in kinds)


def _sample_lines(sample: Sample) -> Iterator[str]:
    yield f"{format_count(sample.rendered, 'image')} rendered again: {sample.equal_bytes:,} with equal bytes"
    if sample.environment:
        changes = ", ".join(f"{name} was {old} and is now {new}" for name, (old, new) in sample.environment.items())
        yield f"compared pixels, because bytes may differ: {changes}"
    if sample.largest is not None and sample.psnr_min is not None:
        yield format_pixel_differences(sample.largest, sample.psnr_min)


def _format_problem(problem: Problem) -> str:
    image = f", image {problem.image_index}" if problem.image_index else ""
    names = [problem.path, problem.id and f"({problem.id}{image})"]
    return f"{' '.join([problem.kind, *filter(None, names)])}: {problem.detail}"
