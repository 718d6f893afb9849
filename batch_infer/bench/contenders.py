"""Time each contender, and measure the bare denoiser and the peak rate of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from batch_infer.accelerator import synchronize
from batch_infer.bench.probe import ModelProbe
from batch_infer.bench.renderers import Renderer
from batch_infer.bench.settings import Size
from batch_infer.bench.subject import Subject
from batch_infer.bench.workload import Workload, size_name, size_of
from batch_infer.energy import EnergyMeter, sum_energy
from batch_infer.records import PromptRequest

TARGET_SECONDS = 1.0
"""Approximate duration of a measurement of the bare denoiser. If a call takes about as long or longer, one is timed."""
MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}
MATMUL_REPEATS = 6


class Contender:
    """Times a way to render the workload, or only its denoiser calls, round by round.

    `seconds`: measured or extrapolated duration of the whole workload in each round; `device_bytes`: peak GPU memory of
    the last round, or None on a CPU or before the first round; `sampled_rows`: number of timed rows if not all rows are
    timed; `details`: more figures for --json.
    """

    sampled_rows: int | None = None

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self._device = name, device
        self.seconds: list[float] = []
        self.device_bytes: int | None = None
        self.details: Mapping[str, Any] = {}

    def warm_up(self) -> None:
        """Do everything that happens only on first use, so that it is not timed."""
        raise NotImplementedError

    def measure(self) -> float:
        """Measure once and return the measured or extrapolated seconds for the whole workload."""
        raise NotImplementedError

    def run_round(self) -> None:
        """Time one round."""
        is_on_gpu = self._device.type == "cuda"
        if is_on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        self.seconds.append(self.measure())
        self.device_bytes = torch.cuda.max_memory_allocated(self._device) if is_on_gpu else None


class RenderingContender(Contender):
    """Times a renderer on its rows.

    The rows may be a sample, which needs only a `share` of the workload's denoiser evaluations. `images` maps the ids
    in `compared` to pixels.
    """

    def __init__(
        self,
        name: str,
        renderer: Renderer,
        rows: Sequence[PromptRequest],
        subject: Subject,
        *,
        compared: Collection[str] = (),
        share: float = 1.0,
    ) -> None:
        super().__init__(name, subject.model.device)
        self.sampled_rows = None if share == 1.0 else len(rows)
        self.images: dict[str, np.ndarray] = {}
        self._renderer, self._rows, self._few_steps = renderer, rows, subject.few_steps
        self._compared, self._share = frozenset(compared), share

    def warm_up(self) -> None:
        """Render a full batch for each size and use of guidance in the rows, so that compilation is not timed."""
        examples = {(size_of(row), row.params.uses_guidance): row for row in self._rows}
        rows = []
        for shape, row in examples.items():
            params = replace(row.params, num_inference_steps=self._few_steps)
            rows += [replace(row, id=f"{shape} {k}", params=params) for k in range(self._renderer.capacity(row))]
        for _ in self._renderer.render(rows):
            pass

    def measure(self) -> float:
        meter = EnergyMeter(self._device.type)
        seconds = seconds_of(self._render, self._device)
        energy = sum_energy([meter.read()])
        self.details = self._renderer.details()  # now, because a stop may interrupt the next round
        if energy is not None:
            self.details = {**self.details, "energy_wh": round(energy / self._share, 6)}
        return seconds / self._share

    def _render(self) -> None:
        for row, pixels in self._renderer.render(self._rows):
            if row.id in self._compared:
                self.images[row.id] = pixels


class BareDenoiser(Contender):
    """Times only denoiser calls with all slots full, which sets a ceiling for renderers with as many slots.

    It times each size for about a second, or for one call if that takes longer, and extrapolates to the workload.
    """

    def __init__(self, name: str, subject: Subject, workload: Workload) -> None:
        super().__init__(name, subject.model.device)
        self._subject, self._workload = subject, workload

    def warm_up(self) -> None:
        self.measure()

    def measure(self) -> float:
        probe, example, shape_of = self._subject.probe, self._workload.rows[0], self._subject.compute.shape_of
        rates = {size: denoiser_rate(probe, example, size, shape_of(*size).slots) for size in self._workload.sizes}
        self.details = {"row_forwards_per_second": {size_name(size): rate for size, rate in rates.items()}}
        return self._workload.denoiser_seconds(rates)


def denoiser_rate(probe: ModelProbe, example: PromptRequest, size: Size, slots: int) -> float:
    """Return denoiser evaluations (batch elements) per second for full batches that follow each other without a pause.

    The prompt of `example` conditions all batch elements. Raises torch.OutOfMemoryError.
    """
    params = replace(example.params, height=size[0], width=size[1])
    batch = probe.fill_batch(replace(example, params=params), slots)
    device = next(probe.denoiser.parameters()).device

    def call(times: int = 1) -> None:
        for _ in range(times):
            batch.call()

    call()
    once = seconds_of(call, device)
    calls = round(TARGET_SECONDS / once)
    return batch.elements / once if calls < 2 else calls * batch.elements / seconds_of(lambda: call(calls), device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the duration of a function in seconds, including the work that it queues on the device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


@torch.inference_mode()
def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a large matrix product.

    Use the fastest of several runs after a warm-up, because other processes may slow some of them down.
    """
    side = MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = [seconds_of(lambda: left @ right, device) for _ in range(MATMUL_REPEATS)]
    return 2 * side**3 / min(seconds[1:]) / 1e12
