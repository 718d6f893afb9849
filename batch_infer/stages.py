"""Record rendering time by stage, and slot occupancy."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(slots=True)
class Stages:
    """Seconds by stage, and counts of images and denoiser calls.

    `seconds` is the total without `compilation`, the time to compile networks for new shapes. With step-level
    batching on a GPU, decoding and checking run concurrently with the denoiser, so the seconds of these stages overlap.
    `ticks` counts denoiser calls, `slot_ticks` their batch elements, and `row_forwards` the elements that belong to a
    row. `started_at` is the start of the first denoiser call, and `ended_at` the end of the last.
    """

    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    check: float = 0.0
    seconds: float = 0.0
    compilation: float = 0.0
    images: int = 0
    row_forwards: int = 0
    slot_ticks: int = 0
    ticks: int = 0
    started_at: float = math.inf
    ended_at: float = -math.inf

    def __add__(self, other: Stages) -> Stages:
        totals = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Stages)}
        totals["started_at"] = min(self.started_at, other.started_at)
        totals["ended_at"] = max(self.ended_at, other.ended_at)
        return Stages(**totals)

    def add_tick(self, used: int, slots: int) -> None:
        """Count a denoiser call with `slots` batch elements, of which rows use `used`."""
        self.ticks += 1
        self.slot_ticks += slots
        self.row_forwards += used

    @property
    def occupancy(self) -> float:
        """Share of denoiser batch elements that belong to a row."""
        return self.row_forwards / self.slot_ticks if self.slot_ticks else 0.0

    @property
    def span(self) -> float:
        """Seconds from the start of the first denoiser call to the end of the last."""
        return max(0.0, self.ended_at - self.started_at)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each stage in the summed seconds of these four stages."""
        by_stage = {name: getattr(self, name) for name in ("encode", "denoise", "decode", "check")}
        total = sum(by_stage.values()) or 1.0
        return {name: round(seconds / total, 4) for name, seconds in by_stage.items()}
