"""The figures of a benchmark, as --json has them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batch_infer.bench.rows import Work
from batch_infer.bench.settings import Size

TERA = 1e12


@dataclass(frozen=True, slots=True)
class Peak:
    """TFLOP/s that utilisation is told of. `source`: `given`, `datasheet` or `measured matmul`."""

    tflops: float
    source: str
    matmul_tflops: float


@dataclass(frozen=True, slots=True)
class TableFigures:
    """What was rendered. `row_forward_tflop` and `decode_tflop` are those of one, counted."""

    rows: int
    steps: tuple[int, int]
    unguided: float
    work: Mapping[Size, Work]
    row_forward_tflop: Mapping[Size, float]
    decode_tflop: Mapping[Size, float]

    @property
    def row_forwards(self) -> int:
        return sum(work.row_forwards for work in self.work.values())

    @property
    def unet_tflop(self) -> float:
        return sum(work.row_forwards * self.row_forward_tflop[size] for size, work in self.work.items())

    @property
    def tflop(self) -> float:
        """Of the UNet and the decoder; text encoding, 0.02 % of it in released models, is left out."""
        return self.unet_tflop + sum(work.images * self.decode_tflop[size] for size, work in self.work.items())

    def as_dict(self) -> dict[str, Any]:
        sizes = [
            {
                "height": size[0],
                "width": size[1],
                "images": work.images,
                "row_forwards": work.row_forwards,
                "row_forward_tflop": self.row_forward_tflop[size],
                "decode_tflop": self.decode_tflop[size],
            }
            for size, work in self.work.items()
        ]
        return {
            "rows": self.rows,
            "steps": list(self.steps),
            "unguided": self.unguided,
            "row_forwards": self.row_forwards,
            "unet_tflop": self.unet_tflop,
            "tflop": self.tflop,
            "sizes": sizes,
        }


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender's. `seconds` are those of the whole table, round by round.

    `sampled`: rows that were timed where it was not all of them; the seconds are extrapolated by row-forwards.
    `ratio`: how many times as fast batch-infer is, None for itself.
    """

    name: str
    seconds: Sequence[float]
    images_per_second: float
    mfu: float
    mfu_of_matmul: float
    ratio: float | None = None
    sampled: int | None = None
    device_bytes: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds": [round(seconds, 4) for seconds in self.seconds],
            "images_per_second": round(self.images_per_second, 4),
            "ratio": None if self.ratio is None else round(self.ratio, 4),
            "mfu": round(self.mfu, 4),
            "mfu_of_matmul": round(self.mfu_of_matmul, 4),
            "sampled_rows": self.sampled,
            "device_bytes": self.device_bytes,
            **self.more,
        }


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """What a number of slots gives.

    `ceiling`: images/s that the bare UNet's row-forwards would come to; `images_per_second`: batch-infer's.
    """

    slots: int
    row_forwards_per_second: Mapping[Size, float]
    ceiling: float
    images_per_second: float
    occupancy: float
    device_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "slots": self.slots,
            "row_forwards_per_second": by_name(self.row_forwards_per_second),
            "ceiling_images_per_second": self.ceiling,
            "images_per_second": self.images_per_second,
            "occupancy": self.occupancy,
            "device_bytes": self.device_bytes,
        }


@dataclass(frozen=True, slots=True)
class Sweep:
    """Points from few slots to many; `beyond`: the number that memory did not hold, if that was met."""

    points: Sequence[SweepPoint]
    beyond: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"points": [point.as_dict() for point in self.points], "out_of_memory_at": self.beyond}


@dataclass(frozen=True, slots=True)
class Parity:
    """How far images are from those that plain diffusers makes of the same rows: steps of 1/255, the furthest."""

    rows: int
    largest: int
    against: str


@dataclass(frozen=True, slots=True)
class Report:
    """All of it. `conditions`: model, device, batch sizes, versions. `stopped`: before all was measured."""

    conditions: Mapping[str, Any]
    table: TableFigures
    peak: Peak
    figures: Sequence[Figures]
    parity: Parity | None
    sweep: Sweep
    peak_memory: Mapping[str, int]
    stopped: bool = False

    @property
    def ours(self) -> Figures:
        return self.figures[0]

    def as_dict(self) -> dict[str, Any]:
        """As --json has it."""
        parity = self.parity
        return {
            **self.conditions,
            "table": self.table.as_dict(),
            "peak": {
                "tflops": round(self.peak.tflops, 4),
                "source": self.peak.source,
                "matmul_tflops": round(self.peak.matmul_tflops, 4),
            },
            "contenders": {figures.name: figures.as_dict() for figures in self.figures},
            "parity": parity and {"rows": parity.rows, "largest_difference": parity.largest, "against": parity.against},
            "sweep": self.sweep.as_dict(),
            "peak_memory": self.peak_memory,
            "stopped": self.stopped,
        }


def by_name(values: Mapping[Size, Any]) -> dict[str, Any]:
    """By `width x height`, as sizes are told."""
    return {size_name(size): value for size, value in values.items()}


def size_name(size: Size) -> str:
    return f"{size[1]}x{size[0]}"


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The median over the rounds, so that a busy moment of the machine, which falls on all alike, tells least.

    After a stop, the last round may have some of them only.
    """
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=False))
