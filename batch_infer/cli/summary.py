"""Format the summary of a run: what happened, what needs attention, how fast it was, and where the files are.

`run` and `retry` print it at their end, and `status` for a run that has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batch_infer.cli.report import (
    format_count,
    format_counts,
    format_duration,
    format_rate,
    format_results,
    line,
)
from batch_infer.settings import OutputSettings, RunSettings, SafetySettings
from batch_infer.terminal import quote_command

if TYPE_CHECKING:
    from batch_infer.jobs import Counts, Summary

MAX_REASONS = 5
"""Maximum number of reasons to print for each of failed and invalid. --json has more."""
SHOWS_STAGES = 100, 60.0
"""A run shows where the time went from this many images or seconds: less is mostly the start and the end."""
SHOWS_GALLERY_HINT = 10
"""Number of images from which looking at them one by one is tedious."""
LEAST_SHARE = 0.005
"""Smallest share of a stage that is printed: smaller ones would be 0%."""

_FATES = {"blank": "stored as {}", "blur": "stored blurred", "drop": "not stored"}
"""What happens to flagged images, by the policies that do not keep them. `{}` is for a black image or several."""


@dataclass(frozen=True, slots=True)
class Place:
    """OUT as messages show it, how its images are stored, and the location of its gallery, if it has one.

    `has_new_images` says whether images were rendered after the gallery was made, as far as is known.
    """

    out: str
    output: OutputSettings = OutputSettings()
    safety: SafetySettings = SafetySettings()
    gallery: str | None = None
    has_new_images: bool = False

    @classmethod
    def of(cls, settings: RunSettings, out: str, gallery: str | None = None, *, has_new_images: bool = False) -> Place:
        return cls(out, settings.output, settings.safety, gallery, has_new_images)


def summary_lines(summary: Summary, place: Place) -> Iterator[str]:
    """Yield the lines that `run` and `retry` print at their end."""
    counts = summary.counts
    is_idle = not counts.remaining and not summary.rendering_seconds
    nothing = ["nothing to render" if counts.rows else "nothing to render: no rows"] * is_idle
    yield from report_lines(summary, place, nothing)
    if summary.unfinished:
        yield f"stopped early: {summary.unfinished:,} left; run the same command again to continue"
    elif counts.remaining:
        yield f"{counts.remaining:,} left: `batch-infer run` renders them"


def report_lines(summary: Summary, place: Place, remarks: Iterable[str] = ()) -> Iterator[str]:
    """Yield the lines about a run that has ended: what happened, what needs attention, figures and files.

    `remarks` come before the figures.
    """
    counts = summary.counts
    left = f" · {counts.remaining:,} left" if counts.remaining else ""
    yield f"{format_counts(counts)}{left}"
    yield from _attention_lines(summary, place)
    yield from remarks
    yield from _figure_lines(summary)
    yield from _place_lines(counts, place)


def progress_lines(summary: Summary, place: Place) -> Iterator[str]:
    """Yield the lines about a run that is active or was killed."""
    yield from _attention_lines(summary, place, has_ended=False)
    if stages := format_stages(summary):
        yield line("time", stages)
    yield from _energy_lines(summary)


def _attention_lines(summary: Summary, place: Place, *, has_ended: bool = True) -> Iterator[str]:
    """Yield what a user should look at, with what to do next: bad rows, truncated prompts, flags and lost workers."""
    yield from _result_lines(summary.counts, place, has_ended=has_ended)
    if summary.deaths:
        workers = f"{format_count(summary.deaths, 'worker')} died, and others took over the unfinished rows"
        yield line("workers", f"{workers} (see {place.out}/logs)")


def _result_lines(counts: Counts, place: Place, *, has_ended: bool) -> Iterator[str]:
    remedies = {
        "failed": f"{quote_command('retry', place.out, '--status', 'failed')} renders them again",
        "invalid": "correct the table, then run the same command again",
        "blocked": "change the blocked prompts, then run the same command again",
    }
    if not has_ended:
        remedies = dict.fromkeys(remedies, "")
    for status in ("failed", "invalid"):
        yield from _reason_lines(counts, status, remedies[status])
    if counts.truncated:
        ends = "is too long for the model, which ignores its end"
        if counts.truncated > 1:
            ends = "are too long for the model, which ignores their ends"
        first = f": {'first ' * (counts.truncated > 1)}{counts.first_truncated}" if counts.first_truncated else ""
        yield line("prompts", f"{counts.truncated:,} {ends}{first}")
        yield line("", "-> shorten them, or render into another --out with --long-prompts")
    yield from _reason_lines(counts, "blocked", remedies["blocked"])
    yield from _flagged_lines(counts, place)


def _flagged_lines(counts: Counts, place: Place) -> Iterator[str]:
    black, them = ("a black image", "it") if counts.flagged == 1 else ("black images", "them")
    if fate := _FATES.get(place.safety.policy):
        remedy = f"{fate.format(black)}; to see {them}, render into another --out with --on-flagged keep"
    else:
        remedy = f"look at {them}" + f" in {place.out}/quarantine" * (place.safety.policy == "quarantine")
    label = "flagged"
    if counts.flagged > max(1, counts.ok):
        yield line(label, f"{'most' if counts.ok else 'all'} images are flagged: check the prompts")
        label = ""
    yield from _reason_lines(counts, "flagged", remedy, label)


def _reason_lines(counts: Counts, status: str, remedy: str, label: str | None = None) -> Iterator[str]:
    """Yield the reasons for results with this status, and the remedy, unless it is empty.

    `label` is that of the first line, the status by default.
    """
    count = getattr(counts, status)
    if not count:
        return
    reasons = [reason for reason in counts.reasons if reason.status == status]
    label, shown = status if label is None else label, 0
    for reason in reasons[:MAX_REASONS]:
        like_it = " like it" * (status not in ("blocked", "flagged"))  # a safety check may have found something else
        more = f" ({reason.results - 1:,} more{like_it})" if reason.results > 1 else ""
        yield line(label, f"{reason.first}: {reason.error}{more}")
        label, shown = "", shown + reason.results
    if reasons and count > shown:
        yield line("", f"and {count - shown:,} more, in the results")
    if remedy:
        yield line(label, f"-> {remedy}")


def _figure_lines(summary: Summary) -> Iterator[str]:
    """Yield the figures of a run: speed, time by stage, energy and cost, as far as they are known."""
    rendered, rate = summary.rendered, summary.images_per_second
    if rate is not None:
        images, seconds = format_count(rendered, "image"), format_duration(summary.rendering_seconds)
        total = f", {format_duration(summary.seconds)} in all" if summary.seconds else ""
        yield line("speed", f"{format_rate(rate)} ({images} in {seconds}{total})")
    if stages := format_stages(summary):
        yield line("time", stages)
    yield from _energy_lines(summary)
    if summary.cost is not None:
        per_image = f" ({1000 * summary.cost / rendered:,.2f} per 1,000 images)" if rendered else ""
        yield line("cost", f"{summary.cost:,.2f}{per_image}")


def _energy_lines(summary: Summary) -> Iterator[str]:
    if summary.energy_wh is not None and (each := summary.energy_wh_per_image) is not None:
        total, gpus = format_energy(summary.energy_wh), "GPU" if summary.processes < 2 else "GPUs"
        yield line("energy", f"{total} on the {gpus}, {format_energy(each)} per image")


def format_stages(summary: Summary) -> str:
    """Format the shares of the stages, slot occupancy and MFU, or return an empty text for a small run."""
    images, seconds = SHOWS_STAGES
    if summary.rendered < images and summary.rendering_seconds < seconds:
        return ""
    shares = sorted(summary.stage_shares.items(), key=lambda item: -item[1])
    parts = [" · ".join(f"{name} {share:.0%}" for name, share in shares if share >= LEAST_SHARE)]
    if summary.occupancy:
        parts.append(f"slot occupancy {summary.occupancy:.0%}")
    if summary.mfu:
        parts.append(f"MFU {summary.mfu:.1%}")
    return ", ".join(filter(None, parts))


def format_energy(watt_hours: float) -> str:
    """Format energy as `1.23 kWh`, `12.3 Wh` or `4.56 mWh`."""
    unit, factor = ("kWh", 1e-3) if watt_hours >= 999.5 else ("Wh", 1.0) if watt_hours >= 0.1 else ("mWh", 1e3)
    value = watt_hours * factor
    return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"


def _place_lines(counts: Counts, place: Place) -> Iterator[str]:
    """Yield where the images, the results and the gallery are."""
    out, output = place.out, place.output
    if counts.images:
        folders = counts.folders or {"images" if output.sink == "folder" else "shards": counts.images}
        several = len(folders) > 1
        paths = [f"{out}/{name}" + f" ({count:,})" * several for name, count in sorted(folders.items())]
        yield line("images", ", ".join(paths))
    yield format_results(out, output.results)
    gallery = quote_command("gallery", out)
    if place.gallery is not None:
        yield line(
            "gallery", place.gallery + (f" (without the new images; update it with {gallery})" * place.has_new_images)
        )
    elif counts.images >= SHOWS_GALLERY_HINT and not counts.remaining:
        yield line("gallery", f"{gallery} makes a page of the images and their rows")
