"""What is known of this machine by image size: batch sizes for --slots auto, and rates for time and cost estimates.

Both are recalled where a plan or a run has measured them under the same conditions, else measured now.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from batch_infer.autotune import Plateau, Rates, load_calibration, save_calibration
from batch_infer.errors import CompilationError
from batch_infer.jobs.job import Job
from batch_infer.planning import SizeCost
from batch_infer.records import utc_now
from batch_infer.settings import BatchShape, Compute
from batch_infer.stages import Stages

if TYPE_CHECKING:
    from batch_infer.autotune import Probe

MOST_MEASURED = 4
"""Image sizes that are measured; figures of the others are scaled from the nearest of these."""
MIN_TICKS = 100
"""UNet calls of one size that a run must have made for its rates to be reliable."""
LIBRARIES = ("batch-infer", "torch", "diffusers")

Size = tuple[int, int]
"""Height and width in pixels."""

log = logging.getLogger("batch_infer")


class BatchShapes:
    """The batch sizes of a job's image sizes, measured or recalled when first requested."""

    def __init__(self, job: Job, probe: Probe) -> None:
        self._job, self._probe = job, probe
        self._is_auto = job.settings.compute.slots == "auto"
        self._known = {(shape.height, shape.width): shape for shape in job.compute.by_size}
        self._measured: dict[Size, BatchShape] = {}

    def of(self, size: Size) -> BatchShape:
        """Return the batch sizes of an image size. Raises ModelError where the model cannot be tried."""
        if size not in self._known:
            self._known[size] = self._find(size) if self._is_auto else self._job.compute.shape_of(*size)
        return self._known[size]

    def choose(self, sizes: Iterable[Size]) -> Compute:
        """Return the job's compute settings with the batch sizes of these image sizes."""
        if not self._is_auto:
            return self._job.compute
        return self._job.compute.with_shapes([self.of(size) for size in sizes])

    def _find(self, size: Size) -> BatchShape:
        conditions = _shape_conditions(self._job, size)
        if (plateau := load_calibration(Plateau, conditions)) is None:
            if len(self._measured) >= MOST_MEASURED:
                return _scale_shape(size, self._measured)
            log.info("looking for the best number of slots at %dx%d pixels", *size[::-1])
            plateau = self._probe.find_plateau(self._job.card, self._job.compute, self._job.settings.safety, size)
            save_calibration(conditions, plateau)
        self._measured[size] = BatchShape(*size, plateau.slots, plateau.decode_batch)
        return self._measured[size]


def remember_shapes(job: Job, compute: Compute) -> None:
    """Save batch sizes that were halved on out-of-memory, with --slots auto."""
    if job.settings.compute.slots != "auto":
        return
    for shape in compute.by_size:
        size = shape.height, shape.width
        if shape != job.compute.shape_of(*size):
            save_calibration(_shape_conditions(job, size), Plateau(shape.slots, shape.decode_batch, utc_now()))


def find_rates(loads: Mapping[Size, SizeCost], job: Job, probe: Probe) -> dict[Size, Rates]:
    """Return the rates of every size. Raises ModelError where the model cannot be tried."""
    known = {size: rates for size in loads if (rates := load_calibration(Rates, _rate_conditions(job, size)))}
    costliest = sorted(loads, key=lambda size: loads[size].row_forwards * _pixels(size), reverse=True)
    for size in costliest[:MOST_MEASURED]:
        if size not in known:
            log.info("measuring %dx%d pixels", *size[::-1])
            known[size] = _measure_rates(size, job, probe)
            save_calibration(_rate_conditions(job, size), known[size])
    return {size: known[size] if size in known else _scale_rates(size, known) for size in loads}


def _measure_rates(size: Size, job: Job, probe: Probe) -> Rates:
    """Measure one size, without torch.compile where that fails and a run would continue without it."""
    settings = job.settings
    others = settings.safety, settings.output.image_format, size
    try:
        return probe.measure_rates(job.card, job.compute, *others)
    except CompilationError as error:
        if settings.compute.compiled:
            raise
        log.warning("%s; measured without it", error)
    return probe.measure_rates(job.card, replace(job.compute, compiled=False), *others)


def remember_rates(job: Job, by_size: Mapping[Size, Stages], image_bytes: Mapping[Size, int], startup: float) -> None:
    """Save what a run took, which is more accurate than a calibration.

    `image_bytes`: of all images of a size; `startup`: seconds before the first UNet call.
    """
    for size, stages in by_size.items():
        if stages.images and stages.ticks >= MIN_TICKS:
            tick, image = stages.denoise / stages.ticks, (stages.seconds - stages.denoise) / stages.images
            rates = Rates(startup, tick, image, image_bytes[size] / stages.images, utc_now())
            save_calibration(_rate_conditions(job, size), rates)


def _scale_shape(size: Size, known: Mapping[Size, BatchShape]) -> BatchShape:
    """Return batch sizes with as many pixels per call as those of the nearest size."""
    near = _nearest(size, known)
    factor = _pixels(near) / _pixels(size)
    slots, decode_batch = max(2, int(known[near].slots * factor)), max(1, int(known[near].decode_batch * factor))
    return BatchShape(*size, slots - slots % 2, decode_batch)


def _scale_rates(size: Size, known: Mapping[Size, Rates]) -> Rates:
    """Return the rates of the nearest size in proportion to the pixels."""
    near = _nearest(size, known)
    rates, factor = known[near], _pixels(size) / _pixels(near)
    return replace(rates, tick=rates.tick * factor, image=rates.image * factor, image_bytes=rates.image_bytes * factor)


def _nearest(size: Size, known: Iterable[Size]) -> Size:
    return min(known, key=lambda other: abs(_pixels(other) - _pixels(size)))


def _pixels(size: Size) -> int:
    return size[0] * size[1]


def _shape_conditions(job: Job, size: Size) -> dict[str, Any]:
    """Return what the throughput plateau depends on, as far as known."""
    compute = job.compute
    return {
        "model": job.card.fingerprint,
        "size": size,
        "compute": [compute.device_name, compute.dtype, compute.threads, compute.compiled],
        **{name: version(name) for name in LIBRARIES},
    }


def _rate_conditions(job: Job, size: Size) -> dict[str, Any]:
    """Return what the rates depend on, as far as known."""
    compute = replace(job.compute, by_size=(job.compute.shape_of(*size),), slots=0, decode_batch=0)
    return {
        "machine": platform.node(),
        "model": job.card.fingerprint,
        "judged": job.settings.safety.uses_checker(has_checker=job.card.has_checker),
        "image_format": job.settings.output.image_format,
        "size": size,
        **asdict(compute),
        **{name: version(name) for name in LIBRARIES},
    }
