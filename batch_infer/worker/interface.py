"""What a worker is told before it begins, and what it tells of its work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from batch_infer.models import ModelCard
from batch_infer.settings import BatchShape, Compute, OutputSettings, SafetySettings
from batch_infer.stages import Stages
from batch_infer.store import PinnedFolder

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """All that a worker needs to know; it can be sent to another process."""

    card: ModelCard
    compute: Compute
    safety: SafetySettings
    output: OutputSettings
    out: PinnedFolder
    carried: pa.Schema
    run: int = 0
    """The number of the run, which its manifest parts bear; 0 where there is none."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker's work took: where the time went, by image size (height, width), and how it computed at the end.

    That is as it was told, but for batches that memory did not hold. `mfu` is the model
    FLOP utilisation (Chowdhery et al., arXiv 2204.02311, appendix B): what the images' UNet rows and decoding come to,
    over what the device could have computed; None where its peak is not known, and before the end. `peak_memory` is in
    bytes.
    """

    stages: Mapping[Size, Stages]
    compute: Compute
    mfu: float | None
    peak_memory: Mapping[str, int]

    @property
    def total(self) -> Stages:
        """Those of all sizes together."""
        return sum(self.stages.values(), Stages())


def sum_stages_by_size(accounts: Iterable[WorkerReport]) -> dict[Size, Stages]:
    """The stages of all accounts, by size; their `seconds` are then those of all devices."""
    found: dict[Size, Stages] = {}
    for account in accounts:
        for size, stages in account.stages.items():
            found[size] = found.get(size, Stages()) + stages
    return found


def smallest_batches(computes: Sequence[Compute]) -> Compute:
    """How all of these can compute: the smallest batches of each size."""
    sizes = {(shape.height, shape.width) for compute in computes for shape in compute.by_size}
    shapes = []
    for size in sorted(sizes):
        each = [compute.shape_of(*size) for compute in computes]
        slots, decode = min(shape.slots for shape in each), min(shape.decode_batch for shape in each)
        shapes.append(BatchShape(*size, slots, decode))
    return computes[0].with_shapes(shapes)
