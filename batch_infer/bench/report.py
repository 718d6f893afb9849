"""Define the report of a benchmark, with the keys that --json prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from batch_infer.bench.workload import Workload

OURS = "batch-infer"


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak TFLOP/s of the device, for MFU. `source`: `given` (by --peak-tflops), `datasheet` or `measured matmul`."""

    tflops: float
    source: str
    matmul_tflops: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """Speed of one contender.

    `seconds`: duration of the whole workload in each round; `ratio`: how many times as fast batch-infer is, None for
    batch-infer itself; `mfu`, `mfu_of_matmul`: model FLOPS utilisation relative to the device's peak and to a matrix
    product; `sampled_rows`: number of timed rows if not all rows were timed. The seconds are then extrapolated in
    proportion to denoiser evaluations, as they always are for the bare denoiser. `details` has `energy_wh`, the energy
    of the whole workload in the last round, if the device reports it.
    """

    seconds: Sequence[float]
    images_per_second: float
    ratio: float | None
    mfu: float
    mfu_of_matmul: float
    sampled_rows: int | None
    device_bytes: int | None
    details: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as --json prints them."""
        seconds = [round(seconds, 4) for seconds in self.seconds]
        return {**_rounded(asdict(self)), "seconds": seconds, **self.details}


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """Throughput at a number of slots. `ceiling_images_per_second`: the limit that the bare denoiser sets."""

    slots: int
    row_forwards_per_second: Mapping[str, float]
    ceiling_images_per_second: float
    images_per_second: float
    occupancy: float
    device_bytes: int | None


@dataclass(slots=True)
class Sweep:
    """Points in order of slots. `out_of_memory_at`: the number of slots that did not fit into memory."""

    points: list[SweepPoint] = field(default_factory=list)
    out_of_memory_at: int | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest difference, in steps of 1/255, between images of batch-infer and of plain diffusers."""

    rows: int
    largest_difference: int
    against: str


@dataclass(frozen=True, slots=True)
class Quality:
    """PSNR in dB of a quantized model's images against those of the unquantized model, and bytes of the weights.

    `mean_psnr` and `min_psnr` are infinite if the images are equal.
    """

    rows: int
    mean_psnr: float
    min_psnr: float
    weight_bytes: int
    unquantized_weight_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as --json prints them. JSON has no infinity, so it is None."""
        figures = _rounded(asdict(self))
        return {name: None if value == math.inf else value for name, value in figures.items()}


@dataclass(frozen=True, slots=True)
class BenchReport:
    """All figures. `conditions`: model, device, batch sizes and versions; `stopped`: whether a stop left some out.

    `quality` is None without --quantize.
    """

    conditions: Mapping[str, Any]
    workload: Workload
    peak: Peak
    contenders: Mapping[str, Measurement]
    parity: Parity | None
    sweep: Sweep
    peak_memory: Mapping[str, int]
    stopped: bool
    quality: Quality | None = None

    @property
    def ours(self) -> Measurement:
        return self.contenders[OURS]

    @property
    def workload_line(self) -> str:
        """The workload as text."""
        workload, rows = self.workload, len(self.workload.rows)
        first, last = workload.steps
        steps = f"{first} steps" if first == last else f"{first} to {last} steps"
        sizes = ", ".join(self.ours.details["slots"])
        return f"{rows:,} row{'s' * (rows > 1)} of {steps}, {workload.unguided:.0%} without guidance, {sizes}"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as --json prints it."""
        return {
            **self.conditions,
            "table": self.workload.as_dict(),
            "peak": _rounded(asdict(self.peak)),
            "contenders": {name: measurement.as_dict() for name, measurement in self.contenders.items()},
            "parity": self.parity and asdict(self.parity),
            "quality": self.quality and self.quality.as_dict(),
            "sweep": asdict(self.sweep),
            "peak_memory": self.peak_memory,
            "stopped": self.stopped,
        }


def _rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
