"""Profile GPU kernels: idle share, time by kind of kernel, and the kernels that take the most time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "convolution": ("fprop", "conv", "implicit", "dgrad"),
    "matrix product": ("gemm", "nvjet", "cutlass", "gemv", "splitk"),
    "compiled": ("triton_",),
    "copy": ("memcpy", "memset"),
}
"""Kinds of kernels, with substrings of kernel names. The first match counts."""
MAX_NAME_CHARACTERS = 110


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy on the GPU, with its times in microseconds."""

    name: str
    start: float
    end: float
    stream: int = 0

    @property
    def duration(self) -> float:
        return self.end - self.start

    @property
    def kind(self) -> str:
        name = self.name.lower()
        return next((kind for kind, patterns in KINDS.items() if any(pattern in name for pattern in patterns)), "other")


class ProfiledTicks:
    """Profiles `count` ticks of a chain from tick `first` on, and then stops the chain.

    The chain calls `stop` once before each tick.
    """

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count, self._calls = first, count, 0
        self._profile: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def stop(self) -> bool:
        """Count a tick, start or stop the profiler, and return whether the chain should stop."""
        self._calls += 1
        if self._calls == self._first:
            self._profile.start()
        elif self._calls == self._first + self._count:
            torch.cuda.synchronize()
            self._profile.stop()
        return self._calls >= self._first + self._count

    def summarize(self) -> tuple[dict[str, Any], list[str]]:
        """Return the summary, and a line for each of the longest kernels. Raises RuntimeError without kernels."""
        events = [event for event in self._profile.events() if event.device_type.name == "CUDA"]
        kernels = [
            Kernel(
                event.name, event.time_range.start, event.time_range.end, getattr(event, "device_resource_id", 0) or 0
            )
            for event in events
            if not getattr(event, "is_user_annotation", False)
        ]
        if not kernels:
            raise RuntimeError("the profiler recorded no kernel: the table was too short, or profiling is not allowed")
        return summarize(kernels, self._count), longest(kernels)


def summarize(kernels: Sequence[Kernel], ticks: int) -> dict[str, Any]:
    """Return the idle share, the gaps, and the time by kind of kernel and by stream."""
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    begin = reach = ordered[0].start
    gaps, busy = [], 0.0
    for kernel in ordered:
        if kernel.start > reach:
            gaps.append(kernel.start - reach)
        busy += max(0.0, kernel.end - max(kernel.start, reach))
        reach = max(reach, kernel.end)
    kinds: Counter[str] = Counter()
    streams: Counter[int] = Counter()
    for kernel in ordered:
        kinds[kernel.kind] += kernel.duration  # type: ignore[assignment]
        streams[kernel.stream] += kernel.duration  # type: ignore[assignment]
    total = sum(kinds.values()) or 1.0
    return {
        "ticks": ticks,
        "span_ms": round((reach - begin) / 1e3, 2),
        "gpu_idle_share": round(1 - busy / ((reach - begin) or 1.0), 4),
        "gaps_over_50us": sum(gap > 50 for gap in gaps),
        "longest_gap_ms": round(max(gaps, default=0.0) / 1e3, 3),
        "kernels_per_tick": len(ordered) // ticks,
        "share_by_kind": {kind: round(time / total, 4) for kind, time in kinds.most_common()},
        "ms_by_stream": {stream: round(time / 1e3, 2) for stream, time in streams.most_common()},
    }


def longest(kernels: Sequence[Kernel], count: int = 30) -> list[str]:
    """Return a line for each of the kernels with the largest total time: share, time, calls, kind, name."""
    times: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for kernel in kernels:
        key = kernel.kind, kernel.name[:MAX_NAME_CHARACTERS]
        times[key] += kernel.duration  # type: ignore[assignment]
        calls[key] += 1
    total = sum(times.values()) or 1.0
    return [
        f"{100 * time / total:5.1f} %  {time / 1e3:9.2f} ms  x{calls[key]:6d}  {key[0]:14}  {key[1]}"
        for key, time in times.most_common(count)
    ]
