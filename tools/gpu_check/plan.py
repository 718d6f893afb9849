"""List the parts of the check, with their time limits, in the order in which they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NEEDS_CUDA = "needs a CUDA device"
"""Reason to skip parts that a CPU cannot run."""


@dataclass(frozen=True)
class Part:
    """One subprocess of the check.

    `module`: a module of `tools.gpu_check.parts`; `limit`: time limit in seconds; `timed`: whether it measures and
    therefore runs alone; `devices`: devices that can run it; `stand_in`: whether it is listed only on these devices.
    """

    name: str
    module: str
    limit: float
    architecture: str = "demo"
    timed: bool = False
    devices: tuple[str, ...] = ("cuda",)
    stand_in: bool = False

    def limit_on(self, device: str) -> float:
        """Return the time limit in seconds. On a CPU, which may be shared, it is long enough to end only hung parts."""
        return self.limit if device == "cuda" else 10 * self.limit


ANYWHERE = ("cuda", "cpu")
PARTS = (
    Part("invariance-sd15", "invariance", 200, "sd15"),
    Part("invariance-sdxl", "invariance", 200, "sdxl"),
    Part("invariance-decidiffusion", "invariance", 200, "decidiffusion"),
    Part("invariance-demo", "invariance", 200, devices=("cpu",), stand_in=True),
    Part("parity", "parity", 200, devices=ANYWHERE),
    Part("command", "command", 200, devices=ANYWHERE),
    Part("bench-sd15", "architecture", 110, "sd15", timed=True),
    Part("bench-sdxl", "architecture", 90, "sdxl", timed=True),
    Part("memory", "memory", 60, "sd15", timed=True),
    Part("bench-decidiffusion", "architecture", 70, "decidiffusion", timed=True),
    Part("bench-demo", "architecture", 100, timed=True, devices=("cpu",), stand_in=True),
    Part("attention", "attention", 40, timed=True),
    Part("ceilings", "ceilings", 30, timed=True, devices=ANYWHERE),
    Part("slots", "slots", 60, "sd15", timed=True),
)
"""Parts in order of importance. If time runs out, the last parts are skipped."""


def select_parts(names: Sequence[str], device: str) -> list[Part]:
    """Return the parts for `device` that have these names, or all its parts without names. Raises ValueError."""
    all_names = [part.name for part in PARTS]
    unknown = [name for name in names if name not in all_names]
    if unknown:
        raise ValueError(f"unknown part {unknown[0]!r}: choose from {', '.join(all_names)}")
    listed = [part for part in PARTS if device in part.devices or not part.stand_in]
    return [part for part in listed if not names or part.name in names]
