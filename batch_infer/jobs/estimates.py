"""Provide batch sizes for --slots auto, and rates for time and cost estimates, both by image size.

Values that an earlier plan or run measured under the same conditions are reused. Other values are measured for up to
MAX_MEASURED_SIZES image sizes, and scaled from these for further sizes.
"""

from __future__ import annotations

import logging
import math
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

MAX_MEASURED_SIZES = 4
"""Maximum number of image sizes to measure. The values of other sizes are scaled from the nearest measured size."""
MIN_TICKS = 100
"""Minimum number of denoiser calls at one image size for a run's rates to be reliable."""
Size = tuple[int, int]
"""Height and width in pixels."""

log = logging.getLogger("batch_infer")


class BatchShapes:
    """Provides the batch sizes for a job's image sizes.

    With --slots auto, loads them on first use, or else measures them, or scales them beyond MAX_MEASURED_SIZES.
    """

    def __init__(self, job: Job, probe: Probe) -> None:
        self._job, self._probe = job, probe
        self._is_auto = job.settings.compute.slots == "auto"
        self._shapes = {(shape.height, shape.width): shape for shape in job.compute.by_size}
        self._measured: dict[Size, BatchShape] = {}

    def for_size(self, size: Size) -> BatchShape:
        """Return the batch sizes for an image size. Raises ModelError or SettingsError if measuring fails."""
        if size not in self._shapes:
            self._shapes[size] = self._load_or_measure(size) if self._is_auto else self._job.compute.shape_of(*size)
        return self._shapes[size]

    def choose(self, sizes: Iterable[Size]) -> Compute:
        """Return the job's compute settings, with the batch sizes for these image sizes if --slots auto was given.

        Raises ModelError or SettingsError if measuring fails.
        """
        compute = self._job.compute
        return compute.with_shapes([self.for_size(size) for size in sizes]) if self._is_auto else compute

    def _load_or_measure(self, size: Size) -> BatchShape:
        conditions = _shape_conditions(self._job, size)
        plateau = load_calibration(Plateau, conditions)
        if plateau is None:
            if len(self._measured) >= MAX_MEASURED_SIZES:
                nearest = _find_nearest(size, self._measured)  # keep its number of pixels per call
                shape, factor = self._measured[nearest], math.prod(nearest) / math.prod(size)
                slots = max(2, int(shape.slots * factor))
                return BatchShape(*size, slots - slots % 2, max(1, int(shape.decode_batch * factor)))
            log.info("looking for the best number of slots at %dx%d pixels", *size[::-1])
            plateau = self._probe.measure_plateau(self._job.card, self._job.compute, self._job.settings.safety, size)
            save_calibration(conditions, plateau)
        self._measured[size] = BatchShape(*size, plateau.slots, plateau.decode_batch)
        return self._measured[size]


def remember_shapes(job: Job, compute: Compute) -> None:
    """If --slots auto was given, save batch sizes that a run has halved, for want of memory, for later commands."""
    for shape in compute.by_size if job.settings.compute.slots == "auto" else ():
        size = shape.height, shape.width
        if shape != job.compute.shape_of(*size):
            save_calibration(_shape_conditions(job, size), Plateau(shape.slots, shape.decode_batch, utc_now()))


def find_rates(costs: Mapping[Size, SizeCost], job: Job, probe: Probe) -> dict[Size, Rates]:
    """Return the rates for every image size in `costs`. Raises ModelError or SettingsError if measuring fails."""
    measured = {size: rates for size in costs if (rates := load_calibration(Rates, _rate_conditions(job, size)))}
    costliest = sorted(costs, key=lambda size: costs[size].row_forwards * math.prod(size), reverse=True)
    for size in costliest[:MAX_MEASURED_SIZES]:
        if size not in measured:
            log.info("measuring the speed at %dx%d pixels (this can take minutes on a CPU)", *size[::-1])
            measured[size] = _measure_rates(size, job, probe)
            save_calibration(_rate_conditions(job, size), measured[size])
    return {size: measured[size] if size in measured else _scale_rates(size, measured) for size in costs}


def _measure_rates(size: Size, job: Job, probe: Probe) -> Rates:
    """Measure one size. If compiling fails, measure without torch.compile, unless --compile was given."""

    def measure(compute: Compute) -> Rates:
        return probe.measure_rates(job.card, compute, job.settings.safety, job.settings.output.image_format, size)

    try:
        return measure(job.compute)
    except CompilationError as error:
        if job.settings.compute.compiled:
            raise
        log.warning("%s; measuring without it", error)
    return measure(replace(job.compute, compiled=False))


def remember_rates(job: Job, by_size: Mapping[Size, Stages], image_bytes: Mapping[Size, int], startup: float) -> None:
    """Save the rates of a run for sizes with enough denoiser calls. They are more accurate than a short measurement's.

    `image_bytes` is the total file size of all images of a size. `startup` is the number of seconds until the first
    worker is ready, without the time to scan tables.
    """
    for size, stages in by_size.items():
        if stages.images and stages.ticks >= MIN_TICKS:
            tick = stages.denoise / stages.ticks
            image = (stages.seconds - stages.denoise) / stages.images
            rates = Rates(startup, tick, image, image_bytes[size] / stages.images, utc_now())
            save_calibration(_rate_conditions(job, size), rates)


def _scale_rates(size: Size, measured: Mapping[Size, Rates]) -> Rates:
    """Return the rates of the size nearest in number of pixels, with all but `start` scaled to this size."""
    nearest = _find_nearest(size, measured)
    rates, factor = measured[nearest], math.prod(size) / math.prod(nearest)
    return replace(rates, tick=rates.tick * factor, image=rates.image * factor, image_bytes=rates.image_bytes * factor)


def _find_nearest(size: Size, measured: Iterable[Size]) -> Size:
    return min(measured, key=lambda candidate: abs(math.prod(candidate) - math.prod(size)))


def _shape_conditions(job: Job, size: Size) -> dict[str, Any]:
    """Return all known conditions that affect the throughput plateau."""
    compute = job.compute
    offload = [compute.offload] if compute.offload else []
    return {
        **_common_conditions(job, size),
        "compute": [compute.device_name, compute.dtype, compute.threads, compute.compiled, *offload],
    }


def _rate_conditions(job: Job, size: Size) -> dict[str, Any]:
    """Return all known conditions that affect the rates."""
    compute = replace(job.compute, by_size=(job.compute.shape_of(*size),), slots=0, decode_batch=0)
    return {
        **_common_conditions(job, size),
        **asdict(compute),
        "machine": platform.node(),
        "judged": job.settings.safety.uses_checker(has_checker=job.card.has_checker),
        "image_format": job.settings.output.image_format,
    }


def _common_conditions(job: Job, size: Size) -> dict[str, Any]:
    versions = {name: version(name) for name in ("batch-infer", "torch", "diffusers")}
    return {"model": job.card.fingerprint, "size": size, **versions}
