"""Define the settings and the report of a worker."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from batch_infer.energy import EnergyReading
from batch_infer.models import ModelCard
from batch_infer.settings import BatchShape, Compute, OutputSettings, SafetySettings
from batch_infer.stages import Stages
from batch_infer.store import StoreAddress

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The settings with which a worker renders. They can be sent to another process."""

    card: ModelCard
    compute: Compute
    safety: SafetySettings
    output: OutputSettings
    out: StoreAddress
    carried: pa.Schema
    run: int = 0
    """The number of the run in OUT, which is stored in its manifest parts, or 0 outside a run."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Stages by image size, compute settings, MFU, peak memory in bytes, and energy.

    `compute` contains the current batch sizes, which shrink when memory runs out. `mfu` is the model FLOP utilisation
    (Chowdhery et al., arXiv 2204.02311, appendix B): the FLOPs of denoiser and decoder for the rendered rows, divided
    by the FLOPs that the device could have computed in the rendering time. It is None before the final report, for
    pipelines that run their own call, with --offload, if the device's peak is unknown, and if nothing was rendered.
    `energy` is None if the device reports none, and before rendering.
    """

    stages: Mapping[Size, Stages]
    compute: Compute
    mfu: float | None
    peak_memory: Mapping[str, int]
    energy: EnergyReading | None = None

    @property
    def total(self) -> Stages:
        """Stages summed over all image sizes."""
        return sum(self.stages.values(), Stages())


def sum_stages_by_size(reports: Iterable[WorkerReport]) -> dict[Size, Stages]:
    """Sum the stages of each image size, including `seconds`, over all workers."""
    sums: dict[Size, Stages] = {}
    for report in reports:
        for size, stages in report.stages.items():
            sums[size] = sums.get(size, Stages()) + stages
    return sums


def take_smallest_batches(computes: Sequence[Compute]) -> Compute:
    """Return the first settings with the smallest batch sizes of each image size, so that they fit on every device."""
    shapes = []
    for size in sorted({(shape.height, shape.width) for compute in computes for shape in compute.by_size}):
        candidates = [compute.shape_of(*size) for compute in computes]
        slots = min(shape.slots for shape in candidates)
        shapes.append(BatchShape(*size, slots, min(shape.decode_batch for shape in candidates)))
    return computes[0].with_shapes(shapes)


def read_peak_memory(device: str) -> dict[str, int]:
    """Return this process's peak memory in bytes: `host_bytes` if the system reports it, and `device_bytes` on CUDA."""
    peaks = {}
    try:  # Linux, where getrusage starts from the parent's peak
        status = Path("/proc/self/status").read_text()
        peaks["host_bytes"] = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        with suppress(ImportError):  # Windows
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            peaks["host_bytes"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device == "cuda":
        import torch

        peaks["device_bytes"] = torch.cuda.max_memory_allocated()
    return peaks
