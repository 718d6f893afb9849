"""The CUDA streams for work besides the UNet: one for each purpose, for the lifetime of the process."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch


@cache
def stream_of(device: torch.device, purpose: Literal["encode", "finish"]) -> torch.cuda.Stream | None:
    """Return the stream for a purpose, or None on a CPU. It is always the same one: torch frees memory by stream.

    Both have a high priority: their kernels are short, and would otherwise queue behind those of a whole UNet call.
    """
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
