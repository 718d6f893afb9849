"""The closing summary that a person reads in five seconds, or a script as JSON."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batch_infer.cli.logs import log
from batch_infer.errors import Interrupted
from batch_infer.terminal import escape_controls

if TYPE_CHECKING:
    from batch_infer.jobs import Counts, Summary
    from batch_infer.settings import RunSettings


ROWS_FAILED = 3
"""The exit code where more rows failed or were invalid than --max-failed."""


def exit_code(summary: Summary, settings: RunSettings, *, retry: bool = False) -> int:
    """Return the exit code of `run`, or of `retry`, which leaves rows without a result to `run`."""
    counts = summary.counts
    if summary.unfinished or (counts.left and not retry):
        return Interrupted.exit_code
    return 0 if settings.max_failed.allows(counts.bad_rows, counts.rows) else ROWS_FAILED


@contextmanager
def printing() -> Iterator[None]:
    """Print the result on stdout. Where nobody takes it, that is told on stderr, and is no reason to fail."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        sys.stdout = io.StringIO()  # else Python tries again at its end, and fails
        closed = error.errno == errno.EPIPE
        log.error("the result is not printed: %s", "stdout is closed" if closed else error.strerror or error)


def say(text: str = "", keep: str = "") -> None:
    """Print a line of a report on stdout. `keep` lists control characters that are not escaped."""
    click.echo(escape_controls(text, keep))


def give(summary: Summary, settings: RunSettings, code: int, *, as_json: bool, quiet: bool) -> None:
    """Print the summary, with `quiet` only where the command has not succeeded."""
    if code or not quiet:
        with printing():
            report(summary, settings.out, settings.output.results, as_json=as_json)


def report(summary: Summary, out: Path, results: Sequence[str], *, as_json: bool) -> None:
    """Print the summary on stdout."""
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
        return
    counts = summary.counts
    say(told_counts(counts))
    for line in counts.bad_results:
        say(f"  {line}")
    if (more := counts.invalid + counts.failed - len(counts.bad_results)) and counts.bad_results:
        say(f"  and {more:,} more, in the results")
    if counts.flagged > counts.ok:
        which = "most" if counts.ok else "all"
        say(f"{which} images are flagged: check the prompts, or keep them in another --out (--on-flagged keep)")
    if (rate := summary.images_per_second) is not None:
        full = f", slot occupancy {summary.occupancy:.0%}" if summary.occupancy else ""
        spent, whole = duration(summary.rendering_seconds), duration(summary.seconds)
        say(f"{number(summary.rendered, 'image')} in {spent} ({rate:.2f} images/s{full}), {whole} in all")
        if summary.cost is not None:
            say(f"cost     {summary.cost:,.2f}")
    elif not counts.left and not summary.rendering_seconds:
        say("nothing to render" if counts.rows else "nothing to render: no rows")
    say(f"images   {out / 'images'}")
    say(told_results(out, results))
    if summary.unfinished:
        say(f"stopped early: {summary.unfinished:,} left; run the same command again to continue")
    elif counts.left:
        say(f"{counts.left:,} left: `batch-infer run` renders them")


def told_counts(counts: Counts) -> str:
    """How many rows there are, and how many results by status."""
    many = f", {counts.images:,} images" if counts.images > counts.rows else ""
    told = [f"{number(counts.rows, 'row')}{many}", f"{counts.ok:,} ok", f"{counts.flagged:,} flagged"]
    told += [f"{count:,} {name}" for name in ("blocked", "invalid", "failed") if (count := getattr(counts, name))]
    told += [f"{number(counts.truncated, 'prompt')} truncated"] * bool(counts.truncated)
    return " · ".join(told)


def told_results(out: Path, formats: Sequence[str]) -> str:
    """Where the results are."""
    return f"results  {', '.join(str(out / f'results.{kind}') for kind in dict.fromkeys(('parquet', *formats)))}"


def number(count: int, noun: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """`12.3 s`, `3 min 05 s`, `7 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
