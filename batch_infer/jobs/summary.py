"""The summary of a run: what became of the rows, how fast, and where the time went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from batch_infer.engines import TaskReport
from batch_infer.jobs.merge import Counts
from batch_infer.stages import Stages


@dataclass(slots=True)
class Summary:
    """`rendered` images, row-forwards, ticks and all times are this run's; `counts` are the table's as it is now.

    `occupancy`: of the slots, how many were full; `unet_busy`: of the time between the first UNet call and the last,
    how much there was one; `mfu`: of what the device could have computed, how much it has, None where that is unknown.
    Where stages overlap, on a GPU, each has its share of the sum of their times. All shares are means over the workers
    (`processes`, 0 where the command rendered by itself; `deaths` of them were made good). `peak_memory` is that of the
    process which held most. `undone` images were this run's, and it would do them if it came again. `rendering_seconds`
    and `rendered` are those of Throughput.
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
    processes: int = 0
    deaths: int = 0
    unfinished: int = 0

    def add(self, work: TaskReport) -> None:
        """Take in what the workers tell of their work."""
        self.processes, self.deaths = work.processes, work.deaths
        for account in work.worker_reports:
            for name, held in account.peak_memory.items():
                self.peak_memory[name] = max(held, self.peak_memory.get(name, 0))
        wholes = [account.total for account in work.worker_reports]
        stages = sum(wholes, Stages())
        self.row_forwards, self.ticks = stages.row_forwards, stages.ticks
        if not stages.ticks:  # stopped before the first row
            return
        self.occupancy = round(stages.occupancy, 4)
        self.stage_shares = stages.shares
        spans = sum(whole.span for whole in wholes)
        self.unet_busy = round(stages.denoise / spans, 4) if spans else 0.0
        told = [(account.mfu, account.total.seconds) for account in work.worker_reports if account.mfu is not None]
        if spent := sum(seconds for _, seconds in told):
            self.mfu = round(sum(mfu * seconds for mfu, seconds in told) / spent, 4)

    @property
    def images_per_second(self) -> float | None:
        return self.rendered / self.rendering_seconds if self.rendered and self.rendering_seconds else None

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
            "processes": self.processes,
            "deaths": self.deaths,
            "undone": self.unfinished,
        }
