"""The summary of a run: what became of the rows, how fast, and where the time went."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_infer.jobs.merge import Counts

if TYPE_CHECKING:
    from batch_infer.chain import Stages


@dataclass(slots=True)
class Summary:
    """`rendered` images, row-forwards, ticks and all times are this run's; `counts` are the table's as it is now.

    `occupancy`: of the slots, how many were full; `unet_busy`: of the time between the first UNet call and the last,
    how much there was one; `mfu`: of what the device could have computed, how much it has, None where that is unknown.
    Where stages overlap, on a GPU, each has its share of the sum of their times.
    """

    counts: Counts = field(default_factory=Counts)
    rendered: int = 0
    seconds: float = 0.0
    cost: float | None = None
    rendering_seconds: float = 0.0
    row_forwards: int = 0
    ticks: int = 0
    occupancy: float | None = None
    unet_busy: float | None = None
    mfu: float | None = None
    stage_shares: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)

    def add_stages(self, by_size: Mapping[tuple[int, int], Stages]) -> None:
        if not by_size:  # stopped before the first row
            return
        stages = reduce(add, by_size.values())
        self.rendering_seconds = stages.seconds
        self.row_forwards, self.ticks = stages.row_forwards, stages.ticks
        self.occupancy = round(stages.occupancy, 4)
        self.unet_busy = round(stages.busy, 4)
        spent = {name: getattr(stages, name) for name in ("encode", "denoise", "decode", "check")}
        total = sum(spent.values()) or 1.0
        self.stage_shares = {name: round(seconds / total, 4) for name, seconds in spent.items()}

    @property
    def images_per_second(self) -> float | None:
        return self.rendered / self.rendering_seconds if self.rendered else None

    def as_dict(self) -> dict[str, Any]:
        """As run.json and --json have it."""
        rate = self.images_per_second
        return {
            **asdict(self.counts),
            "rendered": self.rendered,
            "seconds": round(self.seconds, 3),
            "cost": self.cost,
            "images_per_second": None if rate is None else round(rate, 3),
            "row_forwards": self.row_forwards,
            "ticks": self.ticks,
            "occupancy": self.occupancy,
            "unet_busy": self.unet_busy,
            "mfu": self.mfu,
            "stage_shares": self.stage_shares,
            "peak_memory": self.peak_memory,
        }


def peak_memory(device: str) -> dict[str, int]:
    """The most bytes that this process held, of main memory and of the device's."""
    found = {}
    if (host := _host_peak()) is not None:
        found["host_bytes"] = host
    if device == "cuda":
        import torch

        found["device_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _host_peak() -> int | None:
    """None where the system does not tell."""
    try:  # Linux; its getrusage would begin with what the process had held that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
