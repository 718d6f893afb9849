"""Stop a command on a signal or at the time limit, and print its result."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from batch_infer.cli.logs import log, log_error, stop_log
from batch_infer.errors import StoppedError
from batch_infer.settings import ResultsFormat, list_results_files
from batch_infer.stopping import TIME_LIMIT, Stopper, StopRequested
from batch_infer.store import remove_unfinished
from batch_infer.terminal import escape_controls

if TYPE_CHECKING:
    from batch_infer.jobs import Counts

CHECK_FAILED = 3
"""Exit code if more rows failed or were invalid than --max-failed allows, images failed in a rescore, `verify` found
problems, or `diff` found differences."""
MAX_PRINTED = 20
"""Maximum number of problems or differences to print as text."""
RESUME = "what was committed is kept. Run the same command again to continue"
LEAST_RATE = 0.1
"""Images per second below which the seconds per image say more."""
NOTHING_KEPT = "nothing is kept. Run the same command again"


@contextmanager
def stoppable(time_limit: float | None = None, *, hint: str = RESUME) -> Iterator[Stopper]:
    """Inside the context, stop the command on SIGINT, SIGTERM or SIGHUP, or after `time_limit` seconds.

    `hint` says what is kept and what to do next. Raises StoppedError if the stop interrupted the context.
    """
    committing = "; finished images are being committed" if hint == RESUME else ""
    stopping = f"stopping{committing} (press Ctrl-C again to stop at once)"
    log_stop, log_stop_error = partial(stop_log.warning, stopping), partial(log_error, code=StoppedError.exit_code)
    stop = Stopper(time_limit, hint, log_stop=log_stop, log_error=log_stop_error, remove_files=remove_unfinished)
    try:
        with stop:
            yield stop
    except StopRequested:
        raise stop.error() from None


def log_time_limit(stop: Stopper, remaining: int) -> None:
    """If the time limit stopped the command and images remain, log a warning."""
    if stop.reason == TIME_LIMIT and remaining and stop.time_limit is not None:
        images = f"{format_count(remaining, 'image')} {'is' if remaining == 1 else 'are'}"
        stop_log.warning(
            "the time limit of %s was reached, and %s left: run the same command again to continue",
            format_duration(stop.time_limit),
            images,
            extra={"left": remaining},
        )


@contextmanager
def printing() -> Iterator[None]:
    """Let the context print to stdout. If stdout is closed or its disk is full, log an error and continue."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        sys.stdout = io.StringIO()  # otherwise Python flushes stdout again at exit, and fails
        reason = "stdout is closed" if error.errno == errno.EPIPE else error.strerror or error
        log.error("the result is not printed: %s", reason)


def print_result(lines: Iterable[str], data: Mapping[str, Any] | None = None) -> None:
    """Print `data` as JSON, or `lines` as text if `data` is None."""
    with printing():
        if data is None:
            print_lines(lines)
        else:
            click.echo(json.dumps(data))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines with control characters escaped."""
    for line in lines:
        click.echo(escape_controls(line))


def format_counts(counts: Counts) -> str:
    """Format the numbers of rows, of results if they outnumber the rows, of results by status and truncated prompts."""
    results = f", {counts.results:,} results" if counts.results > counts.rows else ""
    parts = [f"{format_count(counts.rows, 'row')}{results}", f"{counts.ok:,} ok", f"{counts.flagged:,} flagged"]
    parts += [f"{count:,} {name}" for name in ("blocked", "invalid", "failed") if (count := getattr(counts, name))]
    if counts.truncated:
        parts.append(f"{format_count(counts.truncated, 'prompt')} truncated")
    return " · ".join(parts)


def line(label: str, text: str) -> str:
    """Return a line of a report, with its label in a column."""
    return f"{label:<9}{text}"


def format_results(out: str, formats: Sequence[ResultsFormat]) -> str:
    """Format the paths of the results files."""
    return line("results", ", ".join(f"{out}/{name}" for name in list_results_files(formats)))


def format_count(count: int, noun: str, plural: str | None = None) -> str:
    """Format a count as `1 row` or `1,234 rows`. By default, the plural is the noun with an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"


def format_rate(images_per_second: float) -> str:
    """Format a rate as `2.34 images/s`, or a low one as `45.5 s per image`."""
    if images_per_second < LEAST_RATE:
        return f"{format_duration(1 / images_per_second)} per image"
    return f"{images_per_second:.2f} images/s"


def format_pixel_differences(largest: int, psnr_min: float) -> str:
    """Format the largest difference of a channel value, and the lowest PSNR in dB."""
    return f"largest channel difference {largest} of 255, lowest PSNR {psnr_min:.2f} dB"


def format_duration(seconds: float) -> str:
    """Format seconds as `12.3 s`, `3 min 05 s` or `7 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
