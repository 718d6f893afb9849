"""The plot, by matplotlib: throughput against the number of slots."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_infer.bench.figures import Report, SweepPoint
from batch_infer.errors import SettingsError
from batch_infer.store import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES, DPI = (8.0, 5.0), 160
OURS, BARE, PLAIN, LIMIT = "#0b5fa5", "#6d6d6d", "#c4661f", "#a3a3a3"
ENDINGS = (".png", ".svg", ".pdf")


def refuse_unfit(file: Path) -> None:
    """See that the plot can be drawn, before there is anything to draw. Raises SettingsError, with the way out."""
    if find_spec("matplotlib") is None:
        raise SettingsError("--plot needs matplotlib: pip install 'batch-infer[plot]'")
    if file.suffix.lower() not in ENDINGS:
        raise SettingsError(f"--plot {file}: the ending says the format, and there are {', '.join(ENDINGS)}")
    if not file.absolute().parent.is_dir():
        raise SettingsError(f"--plot {file}: there is no folder {file.absolute().parent}")


def draw(report: Report, file: Path) -> None:
    """Write the plot of a report with a sweep. Raises StorageError."""
    from matplotlib.figure import Figure

    # By no window system, nor the state that pyplot keeps.
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    _lines(axes, report.sweep.points)
    _levels(axes, report)
    _frame(axes, report)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format=file.suffix.lower().removeprefix("."))


def _lines(axes: Axes, points: Sequence[SweepPoint]) -> None:
    slots = [point.slots for point in points]
    axes.plot(
        slots, [point.ceiling for point in points], "--o", color=BARE, markersize=4, label="bare UNet, slots full"
    )
    rates = [point.images_per_second for point in points]
    axes.plot(slots, rates, "-o", color=OURS, linewidth=2, label="batch-infer, and how full its slots were")
    for point in points:
        axes.annotate(
            f"{point.occupancy:.0%}", (point.slots, point.images_per_second), (0, -13), textcoords="offset points",
            ha="center", fontsize=8, color=OURS,
        )  # fmt: skip


def _levels(axes: Axes, report: Report) -> None:
    """What does not depend on slots, or was measured at one number of them."""
    marks = iter(("s", "D", "^", "v"))
    slots = max(report.ours.more["slots"].values())
    for figures in report.figures[1:]:
        told = f"plain diffusers, {figures.name.replace('-', ' ')}"
        if figures.name == "one-by-one":
            axes.axhline(figures.images_per_second, color=PLAIN, linestyle=":", label=told)
        elif figures.name != "bare":
            axes.plot([slots], [figures.images_per_second], next(marks), color=PLAIN, label=told)
    peak = report.peak
    ceiling = peak.tflops * report.table.rows / report.table.tflop
    axes.axhline(
        ceiling, color=LIMIT, linewidth=1, label=f"ceiling of the device: {peak.tflops:.3g} TFLOP/s ({peak.source})"
    )


def _frame(axes: Axes, report: Report) -> None:
    conditions, table = report.conditions, report.table
    compute, versions = conditions["compute"], conditions["versions"]
    ticks: Any = [point.slots for point in report.sweep.points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(slots) for slots in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("slots (row-forwards in one UNet call)")
    axes.set_ylabel("throughput (images/s)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    threads = f", threads: {compute['threads']}" if compute["device"] == "cpu" else ""
    steps = " to ".join(str(count) for count in dict.fromkeys(table.steps))
    sizes = ", ".join(report.ours.more["slots"])
    axes.set_title(
        f"{conditions['model']}: {table.rows:,} rows of {steps} steps, {table.unguided:.0%} without guidance, {sizes}\n"
        f"{compute['device_name']}{threads}, {compute['dtype']}, torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}, batch-infer {versions['batch-infer']}",
        fontsize=9, loc="left",
    )  # fmt: skip
