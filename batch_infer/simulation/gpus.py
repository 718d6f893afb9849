"""The GPUs that workers are given, found without loading torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

PATIENT_SECONDS = 20.0


def gpu_names(count: int | None) -> Sequence[str]:
    """What CUDA_VISIBLE_DEVICES says of each: of so many, or of all that this process may see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(_count() if count is None else count)]
    names = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if count is None:
        return names
    return [names[index] if index < len(names) else str(index) for index in range(count)]


def _count() -> int:
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=PATIENT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):  # there is none, or its driver does not answer
        return 0
    return sum(line.startswith("GPU ") for line in told.stdout.splitlines())
