"""The batch sizes that `--slots auto` stands for: recalled where they were measured on such a device, else measured."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from batch_infer.autotune import Plateau, load_calibration, save_calibration
from batch_infer.jobs.job import Job
from batch_infer.records import utc_now
from batch_infer.settings import BatchShape, Compute

if TYPE_CHECKING:
    from batch_infer.autotune import Probe

MOST_MEASURED = 4
"""Image sizes that are measured; the others' batches are told from the nearest of these."""

Size = tuple[int, int]

log = logging.getLogger("batch_infer")


class BatchShapes:
    """The batch sizes of a job's image sizes, found as they are asked for."""

    def __init__(self, job: Job, probe: Probe) -> None:
        self._job, self._probe = job, probe
        self._auto = job.settings.compute.slots == "auto"
        self._found = {(shape.height, shape.width): shape for shape in job.compute.by_size}
        self._measured: list[BatchShape] = []

    def of(self, size: Size) -> BatchShape:
        """Raises ModelError where the model cannot be tried out."""
        if size not in self._found:
            self._found[size] = self._find(size) if self._auto else self._job.compute.shape_of(*size)
        return self._found[size]

    def settle(self, sizes: Iterable[Size]) -> Compute:
        """The job's settings with the batch sizes of all of these."""
        if not self._auto:
            return self._job.compute
        return self._job.compute.with_shapes([self.of(size) for size in sizes])

    def _find(self, size: Size) -> BatchShape:
        if (knee := load_calibration(Plateau, _conditions(self._job, size))) is None:
            if len(self._measured) >= MOST_MEASURED:
                return _nearest(size, self._measured)
            log.info("looking for the best number of slots at %dx%d pixels", *size[::-1])
            knee = self._probe.find_plateau(self._job.card, self._job.compute, self._job.settings.safety, size)
            save_calibration(_conditions(self._job, size), knee)
        shape = BatchShape(*size, knee.slots, knee.decode_batch)
        self._measured.append(shape)
        return shape


def learn_shapes(job: Job, compute: Compute) -> None:
    """Remember batches that had to be halved, where the number of slots was ours to choose."""
    if job.settings.compute.slots != "auto":
        return
    for shape in compute.by_size:
        size = shape.height, shape.width
        if shape != job.compute.shape_of(*size):
            save_calibration(_conditions(job, size), Plateau(shape.slots, shape.decode_batch, utc_now()))


def _nearest(size: Size, known: Iterable[BatchShape]) -> BatchShape:
    """Those of the size nearest in pixels: as many pixels in a call."""
    area = size[0] * size[1]
    near = min(known, key=lambda shape: abs(shape.height * shape.width - area))
    factor = near.height * near.width / area
    slots, decode = max(2, int(near.slots * factor)), max(1, int(near.decode_batch * factor))
    return BatchShape(*size, slots - slots % 2, decode)


def _conditions(job: Job, size: Size) -> dict[str, Any]:
    """All that the knee depends on, as far as we know."""
    compute = job.compute
    return {
        "model": job.card.fingerprint,
        "size": size,
        "compute": [compute.device_name, compute.dtype, compute.threads, compute.compiled],
        **{name: version(name) for name in ("batch-infer", "torch", "diffusers")},
    }
