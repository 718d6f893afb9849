"""The knee: how many slots, and images in a decoder call, a device wants of a model, found by short trials."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from batch_infer.accelerator import is_comfortable, out_of_memory_errors
from batch_infer.autotune.calibration import Plateau
from batch_infer.diffusion import Slots
from batch_infer.records import PromptRequest, SamplingParams, Source, utc_now

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion

SLOTS = (2, 4, 8, 16, 32, 64, 128, 256)
DECODES = (1, 2, 4, 8, 16)
ENOUGH = 0.95
"""A smaller batch that does so much of the best one's work is taken: it has less to empty at a table's end."""
TRIAL_SECONDS = 0.4


def find_plateau(model: LatentDiffusion, params: SamplingParams) -> Plateau:
    """Try batch sizes with rows of this kind until a larger one does no more.

    Raises torch.OutOfMemoryError where not even the least fits.
    """
    slots, held = _grow(SLOTS, lambda number: _full_slots(model, params, number), model.device)
    most = [number for number in DECODES if number <= max(1, slots // 2)]
    decode, _ = _grow(most, lambda number: _decoder(model, params, number), model.device)
    del held
    return Plateau(slots, decode, utc_now())


def find_pipeline_plateau(model: AnyPipeline, params: SamplingParams) -> Plateau:
    """The same of a pipeline that is driven by its own call, which decodes its images one by one."""
    request = PromptRequest("trial", 0, "a trial", None, 0, params, Source("", 0), "")

    def work(number: int) -> Callable[[], object]:
        rows = [request] * (number // params.slots)
        return lambda: model.render(rows, len(rows))

    slots, _ = _grow(SLOTS, work, model.device)
    return Plateau(slots, max(1, min(DECODES[-2], slots // 2)), utc_now())


def _grow(
    numbers: Sequence[int], make: Callable[[int], Callable[[], object]], device: torch.device
) -> tuple[int, Callable[[], object]]:
    """The knee among these batch sizes, and the work of the last that fitted, whose memory it holds."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rates: dict[int, float] = {}
    work: Callable[[], object] = lambda: None  # noqa: E731
    for number in numbers:
        try:
            with out_of_memory_errors():
                trial = make(number)
                seconds = _seconds(trial)
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break
        if rates and not is_comfortable(device):
            break
        rates[number], work = number / seconds, trial
        earlier = [rate for other, rate in rates.items() if other < number]
        if len(earlier) > 1 and rates[number] < max(earlier) * (2 - ENOUGH):
            break
    best = max(rates.values())
    return min(number for number, rate in rates.items() if rate >= ENOUGH * best), work


def _seconds(work: Callable[[], object]) -> float:
    """The quickest of some calls: other work on the machine only ever adds."""
    for _ in range(2):  # the first call of a shape sets things up
        work()
    found: list[float] = []
    while not found or sum(found) < TRIAL_SECONDS:
        _settle()
        started = time.perf_counter()
        work()
        _settle()
        found.append(time.perf_counter() - started)
    return min(found)


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _full_slots(model: LatentDiffusion, params: SamplingParams, number: int) -> Callable[[], object]:
    """One UNet call over so many slots, all of them taken."""
    latent_shape = model.latent_shape(params.height, params.width)
    slots: Slots[None] = Slots(model, number, latent_shape, model.device, model.dtype)
    table = model.solver.table(params.num_inference_steps)
    request = PromptRequest("trial", 0, "", None, 0, params, Source("", 0), "")
    (conditioning,) = model.condition([request])

    @torch.inference_mode()
    def tick() -> None:
        while slots.free >= params.slots:
            slots.admit(None, params, 0, table, conditioning.context)
        slots.tick()

    return tick


def _decoder(model: LatentDiffusion, params: SamplingParams, number: int) -> Callable[[], object]:
    """One decoder call over so many images."""
    latents = torch.zeros(number, *model.latent_shape(params.height, params.width), device=model.device)
    return lambda: model.decode(latents)
