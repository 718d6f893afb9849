"""The streams of a GPU beside the one that the UNet is called on: one for each purpose, for as long as the process."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch


@cache
def stream_of(device: torch.device, purpose: Literal["encode", "finish"]) -> torch.cuda.Stream | None:
    """None on a CPU. Always the same, since memory that was used on one is not given away to another."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
