"""Stages: where the time of rendering went, and how full the slots were."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(slots=True)
class Stages:
    """Seconds by stage, and counts.

    `seconds` are all that went by, except `compilation`: those in which a network was compiled for a new shape. On a
    GPU the stages overlap: decoding and checking go on beside the UNet, so their seconds are part of its own. `began`
    and `ended`: the first UNet call's start and the last one's end.
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
    began: float = math.inf
    ended: float = -math.inf

    def __add__(self, other: Stages) -> Stages:
        both = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Stages)}
        return Stages(**{**both, "began": min(self.began, other.began), "ended": max(self.ended, other.ended)})

    @property
    def occupancy(self) -> float:
        """Row-forwards done over row-forwards computed."""
        return self.row_forwards / self.slot_ticks if self.slot_ticks else 0.0

    @property
    def span(self) -> float:
        """Seconds between the first UNet call's start and the last one's end."""
        return max(0.0, self.ended - self.began)

    @property
    def busy(self) -> float:
        """The share of that time in which there was a UNet call."""
        return self.denoise / self.span if self.span else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Of each stage, in the sum of their times."""
        spent = {name: getattr(self, name) for name in ("encode", "denoise", "decode", "check")}
        total = sum(spent.values()) or 1.0
        return {name: round(seconds / total, 4) for name, seconds in spent.items()}
