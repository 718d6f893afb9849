"""Plot throughput against the number of slots with matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_infer.bench.report import OURS, BenchReport
from batch_infer.errors import SettingsError
from batch_infer.extras import install_command
from batch_infer.store import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES, DPI = (8.0, 5.0), 160
BLUE, GREY, ORANGE, LIGHT_GREY = "#0b5fa5", "#6d6d6d", "#c4661f", "#a3a3a3"
FORMATS = (".png", ".svg", ".pdf")


def check_plot(file: Path) -> None:
    """Raise SettingsError if matplotlib, a supported file ending or the file's folder is missing."""
    if find_spec("matplotlib") is None:
        raise SettingsError(f"--plot needs matplotlib: {install_command('plot')}")
    if file.suffix.lower() not in FORMATS:
        raise SettingsError(f"--plot {file}: the file must end with {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if not file.absolute().parent.is_dir():
        raise SettingsError(f"--plot {file}: there is no folder {file.absolute().parent}")


def draw(report: BenchReport, file: Path) -> None:
    """Plot the sweep and baselines of a report to a file. Raises StorageError."""
    from matplotlib.figure import Figure

    # Avoid pyplot, which keeps global state and may select a GUI backend.
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    _draw_sweep(axes, report)
    _draw_baselines(axes, report)
    _label(axes, report)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format=file.suffix.lower().removeprefix("."))


def _draw_sweep(axes: Axes, report: BenchReport) -> None:
    points = report.sweep.points
    slots = [point.slots for point in points]
    ceilings = [point.ceiling_images_per_second for point in points]
    axes.plot(slots, ceilings, "--o", color=GREY, markersize=4, label="bare denoiser, all slots full")
    rates = [point.images_per_second for point in points]
    axes.plot(slots, rates, "-o", color=BLUE, linewidth=2, label="batch-infer, with slot occupancy")
    for point, rate in zip(points, rates, strict=True):
        offset: Any = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{point.occupancy:.0%}", (point.slots, rate), fontsize=8, color=BLUE, **offset)


def _draw_baselines(axes: Axes, report: BenchReport) -> None:
    """Draw the diffusers baselines and the device's ceiling.

    Grouped baselines are points at their number of slots, or at the largest number if it differs between image sizes.
    The others do not depend on slots, so they are horizontal lines.
    """
    markers = iter(("s", "D", "^", "v"))
    slots = max(report.ours.details["slots"].values())
    for name, measurement in report.contenders.items():
        label = f"plain diffusers, {name.replace('-', ' ')}"
        if name == "one-by-one":
            axes.axhline(measurement.images_per_second, color=ORANGE, linestyle=":", label=label)
        elif name not in (OURS, "bare"):
            axes.plot([slots], [measurement.images_per_second], next(markers), color=ORANGE, label=label)
    peak, workload = report.peak, report.workload
    label = f"ceiling of the device: {peak.tflops:.3g} TFLOP/s ({peak.source})"
    axes.axhline(peak.tflops * len(workload.rows) / workload.tflop, color=LIGHT_GREY, linewidth=1, label=label)


def _label(axes: Axes, report: BenchReport) -> None:
    compute, versions = report.conditions["compute"], report.conditions["versions"]
    ticks: Any = [point.slots for point in report.sweep.points]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(slots) for slots in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("slots (denoiser batch size in batch elements)")
    axes.set_ylabel("throughput (images/s)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    threads = f", threads: {compute['threads']}" if compute["device"] == "cpu" else ""
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers", "batch-infer"))
    title = f"{report.conditions['model']}: {report.workload_line}\n{compute['device_name']}{threads}, "
    axes.set_title(f"{title}{compute['dtype']}, {libraries}", fontsize=9, loc="left")
