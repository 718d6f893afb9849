"""Measure durations and rates, and compare images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

TERA = 1e12


def synchronize() -> None:
    """Wait until the GPU has finished all work. Without a GPU, return at once."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shortest_seconds(work: Callable[[], object], *, calls: int = 1, repeats: int = 3) -> float:
    """Return the seconds of one call, from the fastest repeat of `calls` calls after a warm-up call."""
    work()
    durations = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize()
        durations.append(time.perf_counter() - started)
    return min(durations) / calls


def rate(flop: float, seconds: float) -> dict[str, float]:
    """Return milliseconds and TFLOP/s."""
    return {"ms": round(seconds * 1e3, 3), "tflops": round(flop / seconds / TERA, 3)}


def compare_images(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Compare the images of `theirs` with our images of the same ids.

    Differences are in steps of 1/255. `worst_psnr_db` is the PSNR of the least similar image.
    """
    gaps = [np.abs(ours[name].astype(int) - image.astype(int)) for name, image in theirs.items()]
    psnr = [10 * np.log10(255**2 / max(1e-9, float((gap.astype(float) ** 2).mean()))) for gap in gaps]
    return {
        "images": len(gaps),
        "largest_difference": max(int(gap.max()) for gap in gaps),
        "mean_difference": round(float(np.mean([gap.mean() for gap in gaps])), 4),
        "share_over_1": round(float(np.mean([(gap > 1).mean() for gap in gaps])), 6),
        "worst_psnr_db": round(float(min(psnr)), 1),
    }


def count_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, int]:
    """Count the images of `theirs` that equal our images of the same ids."""
    equal = sum(bool(np.array_equal(ours[name], image)) for name, image in theirs.items())
    return {"equal": equal, "images": len(theirs)}
