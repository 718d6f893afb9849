"""Find the throughput plateau: the batch sizes beyond which a device renders hardly any faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch

from batch_infer.accelerator import has_memory_headroom, out_of_memory_errors, synchronize
from batch_infer.autotune.cache import Plateau
from batch_infer.diffusion import Slots
from batch_infer.records import PromptRequest, SamplingParams, Source, utc_now

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion

SLOTS = (2, 4, 8, 16, 32, 64, 128, 256)
DECODE_BATCHES = (1, 2, 4, 8, 16)
SUFFICIENT_SHARE = 0.95
"""Share of the best measured throughput that a batch size must reach to be chosen.

The smallest such size is chosen, since it leaves the fewest slots empty at the end of a run. From the third size on,
the search ends as soon as a size's throughput exceeds the best before it by less than 1 - SUFFICIENT_SHARE.
"""
TRIAL_SECONDS = 0.4
"""Minimum number of seconds for which to time a batch size, after the warm-up."""

Trial = Callable[[], object]


def find_plateau(model: LatentDiffusion | AnyPipeline, params: SamplingParams) -> Plateau:
    """Return the batch sizes at the plateau for rows with `params`.

    Time larger and larger denoiser calls, and then decoder calls, until throughput stops rising, memory is almost full,
    or the largest size is reached. Raises torch.OutOfMemoryError if not even the smallest batch fits, and RowError if a
    pipeline without a family does not support `params`.
    """
    if model.uses_pipeline_call:
        return _find_pipeline_plateau(cast("AnyPipeline", model), params)
    family_model = cast("LatentDiffusion", model)
    slots, full_slots = _search(SLOTS, lambda size: _make_tick(family_model, params, size), model.device)
    sizes = [size for size in DECODE_BATCHES if size <= max(1, slots // 2)]
    decode_batch, _ = _search(sizes, lambda size: _make_decode(family_model, params, size), model.device)
    del full_slots  # the slots had to stay in memory while decoding was measured
    return Plateau(slots, decode_batch, utc_now())


def _find_pipeline_plateau(model: AnyPipeline, params: SamplingParams) -> Plateau:
    """Return the batch sizes for a pipeline's own call. The decode batch is derived from the slots."""
    if not model.plan.is_stacked:
        return Plateau(SLOTS[0], 1, utc_now())
    slots, _ = _search(SLOTS, lambda size: model.make_call(size, params), model.device)
    return Plateau(slots, max(1, min(DECODE_BATCHES[-2], slots // 2)), utc_now())


def _search(sizes: Sequence[int], make_trial: Callable[[int], Trial], device: torch.device) -> tuple[int, Trial]:
    """Return the batch size at the plateau, and the last trial that fit, which occupies memory until it is deleted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rates: dict[int, float] = {}
    last: Trial = lambda: None  # noqa: E731
    for size in sizes:
        try:
            with out_of_memory_errors():
                trial = make_trial(size)
                rate = size / _measure_seconds(trial, device)
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break
        if rates and not has_memory_headroom(device):
            break
        previous_best = max(rates.values(), default=0.0)
        rates[size], last = rate, trial
        if len(rates) > 2 and rate < previous_best * (2 - SUFFICIENT_SHARE):
            break
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= SUFFICIENT_SHARE * best), last


def _measure_seconds(trial: Trial, device: torch.device) -> float:
    """Return the duration of the fastest call in seconds, since other work on the machine can only slow calls down."""
    for _ in range(2):  # warm up, since the first call with a shape takes longer
        trial()
    times: list[float] = []
    while sum(times) < TRIAL_SECONDS or not times:
        synchronize(device)
        started = time.perf_counter()
        trial()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _make_tick(model: LatentDiffusion, params: SamplingParams, size: int) -> Trial:
    """Return a function that makes one denoiser call with all `size` slots filled."""
    latent_shape = model.latent_shape(params.height, params.width)
    slots: Slots[None] = Slots(model, size, latent_shape, model.device, model.dtype)
    table = model.solver.table(params.num_inference_steps)
    (conditioning,) = model.condition([_make_request(params)])

    @torch.inference_mode()
    def tick() -> None:
        while slots.free_count >= params.slots:
            slots.admit(None, params, 0, table, conditioning.context)
        slots.tick()

    return tick


@torch.inference_mode()
def _make_decode(model: LatentDiffusion, params: SamplingParams, size: int) -> Trial:
    """Return a function that decodes `size` images in one call."""
    latents = torch.zeros(size, *model.latent_shape(params.height, params.width), device=model.device)
    return lambda: model.decode(latents)


def _make_request(params: SamplingParams, prompt: str = "") -> PromptRequest:
    return PromptRequest("trial", 0, prompt, None, 0, params, Source("", 0), "")
