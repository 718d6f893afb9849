"""The most memory that this process has held."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory(device: str) -> dict[str, int]:
    """In bytes, of main memory and, where it computes on `cuda`, of the device's."""
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
