"""Seconds and memory of work on a device, and what its arithmetic unit does at most."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}
MATMUL_REPEATS = 6


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """From start to end, with all that the device was asked to do."""
    settle(device)
    started = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - started


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_peak(device: torch.device) -> int | None:
    """The most bytes that lay on a GPU since `forget_peak`; None on a CPU, which does not tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@torch.inference_mode()
def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product: the quickest of some, since other work on the machine only ever adds."""
    side = MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    found = [seconds_of(lambda: left @ right, device) for _ in range(MATMUL_REPEATS)]
    return 2 * side**3 / min(found[1:]) / 1e12
