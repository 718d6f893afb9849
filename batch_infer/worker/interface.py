"""The interface of a worker: its settings, and its report of time, batch sizes and memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from batch_infer.models import ModelCard
from batch_infer.settings import BatchShape, Compute, OutputSettings, SafetySettings
from batch_infer.stages import Stages
from batch_infer.store import PinnedFolder

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Everything a worker needs to render. Can be sent to another process."""

    card: ModelCard
    compute: Compute
    safety: SafetySettings
    output: OutputSettings
    out: PinnedFolder
    carried: pa.Schema
    run: int = 0
    """Number of the run, stored in its manifest parts. 0 if there is no run."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Time by stage and image size, final batch sizes, and peak memory in bytes.

    `compute` equals the settings' except for batch sizes that were halved on out-of-memory. `mfu` is the model FLOP
    utilisation (Chowdhery et al., arXiv 2204.02311, appendix B): the FLOPs of the images' UNet rows and decoding over
    what the device could have computed. It is None if the device's peak is unknown, and before the end.
    """

    stages: Mapping[Size, Stages]
    compute: Compute
    mfu: float | None
    peak_memory: Mapping[str, int]

    @property
    def total(self) -> Stages:
        """Stages summed over all image sizes."""
        return sum(self.stages.values(), Stages())


def sum_stages_by_size(reports: Iterable[WorkerReport]) -> dict[Size, Stages]:
    """Return the stages of each image size summed over workers, so `seconds` are device seconds."""
    sums: dict[Size, Stages] = {}
    for report in reports:
        for size, stages in report.stages.items():
            sums[size] = sums.get(size, Stages()) + stages
    return sums


def take_smallest_batches(computes: Sequence[Compute]) -> Compute:
    """Return settings with the smallest batch sizes of each image size, which fit on every device."""
    shapes = []
    for size in sorted({(shape.height, shape.width) for compute in computes for shape in compute.by_size}):
        each = [compute.shape_of(*size) for compute in computes]
        slots, decode_batch = min(shape.slots for shape in each), min(shape.decode_batch for shape in each)
        shapes.append(BatchShape(*size, slots, decode_batch))
    return computes[0].with_shapes(shapes)


def read_peak_memory(device: str) -> dict[str, int]:
    """Return the peak of this process in bytes: `host_bytes`, and `device_bytes` if `device` is "cuda"."""
    peaks = {}
    if (host := _peak_host_memory()) is not None:
        peaks["host_bytes"] = host
    if device == "cuda":
        import torch

        peaks["device_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


def _peak_host_memory() -> int | None:
    """Return bytes, or None if the system does not report them."""
    try:  # Linux: getrusage there starts from the peak of the parent process
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
