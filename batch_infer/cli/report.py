"""The closing summary that a person reads in five seconds, or a script as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from batch_infer.jobs.summary import Summary


def report(summary: Summary, out: Path, results: Sequence[str], *, as_json: bool) -> None:
    """Print the summary on stdout."""
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
        return
    counts = summary.counts
    many = f", {counts.images:,} images" if counts.images > counts.rows else ""
    told = [
        f"{_number(counts.rows, 'row')}{many}",
        f"{counts.ok:,} ok",
        f"{counts.flagged:,} flagged",
    ]
    told += [f"{number:,} {name}" for name in ("blocked", "invalid", "failed") if (number := getattr(counts, name))]
    click.echo(" · ".join(told))
    if (rate := summary.images_per_second) is not None:
        full = f", slots {summary.occupancy:.0%} full" if summary.occupancy else ""
        spent, whole = _duration(summary.rendering_seconds), _duration(summary.seconds)
        click.echo(f"{_number(summary.rendered, 'image')} in {spent} ({rate:.2f} images/s{full}), {whole} in all")
    elif not counts.left:
        click.echo("nothing to do: all of it was done before")
    click.echo(f"images   {out / 'images'}")
    click.echo(f"results  {', '.join(str(out / f'results.{kind}') for kind in dict.fromkeys(('parquet', *results)))}")
    if counts.left:
        click.echo(f"stopped early: {counts.left:,} left; run the same command again to go on")


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
