"""Compare the throughput of batch-infer, plain diffusers and the bare denoiser on one workload, in one process."""

from typing import TYPE_CHECKING

from batch_infer.bench.settings import (
    ARCHITECTURES,
    BASELINES,
    SWEEP,
    BenchSettings,
    WorkloadSettings,
    parse_against,
    parse_steps,
    parse_sweep,
)
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.bench.comparison import benchmark
    from batch_infer.bench.report import BenchReport
else:
    __getattr__ = import_on_use(__name__, comparison=("benchmark",), report=("BenchReport",))

__all__ = [
    "ARCHITECTURES",
    "BASELINES",
    "BenchReport",
    "BenchSettings",
    "SWEEP",
    "WorkloadSettings",
    "benchmark",
    "parse_against",
    "parse_steps",
    "parse_sweep",
]
