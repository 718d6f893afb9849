"""Throughput against the number of slots: what the bare UNet would allow, and what batch-infer makes of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.bench import clock
from batch_infer.bench.bare import BareUNet, seconds_for
from batch_infer.bench.contenders import Ours
from batch_infer.bench.figures import Sweep, SweepPoint
from batch_infer.bench.lanes import Course, RenderingLane
from batch_infer.bench.rows import Table
from batch_infer.bench.subject import Subject
from batch_infer.settings import Compute

log = logging.getLogger("batch_infer")


def sweep(
    numbers: Sequence[int], subject: Subject, table: Table, bare: BareUNet, points: list[SweepPoint] | None = None
) -> Sweep:
    """A point for each number of slots; where memory does not hold one, no larger one is tried.

    Each is added to `points` once it is measured, also where a stop comes before the last.
    """
    points = [] if points is None else points
    for slots in numbers:
        try:
            with out_of_memory_errors():
                points.append(_measure(slots, subject, table, bare))
        except torch.OutOfMemoryError:
            log.info("%d slots: out of memory", slots)
            return Sweep(points, slots)
        log.info("%d slots: %.2f images/s, of %.2f", slots, points[-1].images_per_second, points[-1].ceiling)
    return Sweep(points)


def _measure(slots: int, subject: Subject, table: Table, bare: BareUNet) -> SweepPoint:
    """Raises torch.OutOfMemoryError."""
    device = subject.model.device
    clock.forget_peak(device)
    rates = {size: bare.rate(size, slots) for size in table.work}
    ours = Ours(subject.model, _with_slots(subject.compute, slots))
    lane = RenderingLane(f"{slots} slots", ours, Course(table.rows, frozenset()), subject)
    lane.warm_up()
    lane.run()
    return SweepPoint(
        slots=slots,
        row_forwards_per_second=rates,
        ceiling=len(table.rows) / seconds_for(table, rates),
        images_per_second=len(table.rows) / lane.seconds[0],
        occupancy=ours.chain.stages.occupancy,
        device_bytes=clock.device_peak(device),
    )


def _with_slots(compute: Compute, slots: int) -> Compute:
    """The same, but for the slots of all sizes; a decoder call takes no more images than the slots hold."""
    return replace(compute, slots=slots, decode_batch=min(compute.decode_batch, slots // 2), by_size=())
