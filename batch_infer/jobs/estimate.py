"""What sizes take on this machine: recalled where a plan or a run has measured them, else measured now."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from batch_infer.autotune import Rates, load_calibration, save_calibration
from batch_infer.errors import CompilationError
from batch_infer.jobs.job import Job
from batch_infer.planning import SizeCost
from batch_infer.records import utc_now
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.autotune import Probe

MOST_MEASURED = 4
"""Sizes that are measured; those of the other rows are told from the nearest of these."""

TICKS_THAT_TELL = 100
"""A run of fewer UNet calls is over before its figures settle."""

Size = tuple[int, int]

log = logging.getLogger("batch_infer")


def rates_of(loads: Mapping[Size, SizeCost], job: Job, probe: Probe) -> dict[Size, Rates]:
    """The rates of every size. Raises ModelError where the model cannot be tried out."""
    found = {size: rates for size in loads if (rates := load_calibration(Rates, _conditions(job, size))) is not None}
    dearest = sorted(loads, key=lambda size: loads[size].row_forwards * size[0] * size[1], reverse=True)
    for size in dearest[:MOST_MEASURED]:
        if size not in found:
            log.info("measuring %dx%d pixels", *size[::-1])
            found[size] = _measure(size, job, probe)
            save_calibration(_conditions(job, size), found[size])
    return {size: found[size] if size in found else _nearest(size, found) for size in loads}


def _measure(size: Size, job: Job, probe: Probe) -> Rates:
    """The rates of one size, without torch.compile where that fails and a run would go on without it."""
    settings = job.settings
    others = settings.safety, settings.output.image_format, size
    try:
        return probe.measure_rates(job.card, job.compute, *others)
    except CompilationError as error:
        if settings.compute.compiled:
            raise
        log.warning("%s; measured without it", error)
    return probe.measure_rates(job.card, replace(job.compute, compiled=False), *others)


def learn(job: Job, by_size: Mapping[Size, Stages], lengths: Mapping[Size, int], start: float) -> None:
    """Remember what a run took, which tells more than a calibration. `lengths`: bytes of all images of a size."""
    for size, stages in by_size.items():
        if stages.images and stages.ticks >= TICKS_THAT_TELL:
            tick, image = stages.denoise / stages.ticks, (stages.seconds - stages.denoise) / stages.images
            rates = Rates(start, tick, image, lengths[size] / stages.images, utc_now())
            save_calibration(_conditions(job, size), rates)


def _nearest(size: Size, known: Mapping[Size, Rates]) -> Rates:
    """Those of the size nearest in pixels, in proportion to the pixels."""
    area = size[0] * size[1]
    near = min(known, key=lambda other: abs(other[0] * other[1] - area))
    factor = area / (near[0] * near[1])
    rates = known[near]
    return replace(rates, tick=rates.tick * factor, image=rates.image * factor, image_bytes=rates.image_bytes * factor)


def _conditions(job: Job, size: Size) -> dict[str, Any]:
    """All that the rates depend on, as far as we know."""
    compute = replace(job.compute, by_size=(job.compute.shape_of(*size),), slots=0, decode_batch=0)
    return {
        "machine": platform.node(),
        "model": job.card.fingerprint,
        "judged": job.settings.safety.uses_checker(has_checker=job.card.has_checker),
        "image_format": job.settings.output.image_format,
        "size": size,
        **asdict(compute),
        **{name: version(name) for name in ("batch-infer", "torch", "diffusers")},
    }
