"""The benchmark: batch-infer beside plain diffusers and the bare UNet, on the same rows in one process."""

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
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.bench.contest import benchmark
    from batch_infer.bench.figures import Figures, Report, SweepPoint
else:
    __getattr__ = import_on_use(
        __name__,
        contest=("benchmark",),
        figures=(
            "Figures",
            "Report",
            "SweepPoint",
        ),
    )

__all__ = [
    "ARCHITECTURES",
    "BenchSettings",
    "Figures",
    "RIVALS",
    "Report",
    "SWEEP",
    "SweepPoint",
    "TableShape",
    "benchmark",
    "parse_against",
    "parse_steps",
    "parse_sweep",
]
