"""The benchmark: batch-infer beside plain diffusers and the bare UNet, on the same rows in one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batch_infer.bench.settings import (
    ARCHITECTURES,
    RIVALS,
    SWEEP,
    BenchSettings,
    TableShape,
    parse_against,
    parse_steps,
    parse_sweep,
)

if TYPE_CHECKING:
    from batch_infer.bench.figures import Report

__all__ = [
    "ARCHITECTURES",
    "RIVALS",
    "SWEEP",
    "BenchSettings",
    "TableShape",
    "bench",
    "parse_against",
    "parse_steps",
    "parse_sweep",
]


def bench(settings: BenchSettings) -> Report:
    """Time all that the settings name. Raises UsageError before anything is timed."""
    if settings.plot is not None:
        from batch_infer.bench.plotting import refuse_unfit

        refuse_unfit(settings.plot)
    from batch_infer.bench.contest import hold

    report = hold(settings)
    if settings.plot is not None and not report.stopped:
        from batch_infer.bench.plotting import draw

        draw(report, settings.plot)
    return report
