"""The search for the throughput plateau: the batch sizes beyond which a device renders no faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from batch_infer.accelerator import has_memory_headroom, out_of_memory_errors
from batch_infer.autotune.cache import Plateau
from batch_infer.diffusion import Slots
from batch_infer.records import PromptRequest, SamplingParams, Source, utc_now

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion

SLOTS = (2, 4, 8, 16, 32, 64, 128, 256)
DECODE_BATCHES = (1, 2, 4, 8, 16)
SUFFICIENT = 0.95
"""The smallest batch with this share of the best throughput is chosen: it has less to finish at a table's end."""
TRIAL_SECONDS = 0.4

Trial = Callable[[], object]


def find_plateau(model: LatentDiffusion, params: SamplingParams) -> Plateau:
    """Measure growing batches of rows with `params` until throughput stops rising.

    Raises torch.OutOfMemoryError if not even the smallest batch fits.
    """
    slots, full_slots = _grow(SLOTS, lambda size: _make_tick(model, params, size), model.device)
    sizes = [size for size in DECODE_BATCHES if size <= max(1, slots // 2)]
    decode_batch, _ = _grow(sizes, lambda size: _make_decode(model, params, size), model.device)
    del full_slots  # decoding was measured while the slots were in memory
    return Plateau(slots, decode_batch, utc_now())


def find_pipeline_plateau(model: AnyPipeline, params: SamplingParams) -> Plateau:
    """Measure growing batches of a pipeline that runs by its own call and decodes its images one by one.

    Raises torch.OutOfMemoryError if not even the smallest batch fits.
    """
    request = _make_request(params, "a trial")

    def make_call(size: int) -> Trial:
        rows = [request] * (size // params.slots)
        return lambda: model.render(rows, len(rows))

    slots, _ = _grow(SLOTS, make_call, model.device)
    return Plateau(slots, max(1, min(DECODE_BATCHES[-2], slots // 2)), utc_now())


def _grow(sizes: Sequence[int], make_trial: Callable[[int], Trial], device: torch.device) -> tuple[int, Trial]:
    """Return the batch size at the plateau, and the last trial that fitted, which holds its memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rates: dict[int, float] = {}
    last: Trial = lambda: None  # noqa: E731
    for size in sizes:
        try:
            with out_of_memory_errors():
                trial = make_trial(size)
                rate = size / _seconds(trial)
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break
        if rates and not has_memory_headroom(device):
            break
        best_before = max(rates.values(), default=0.0)
        rates[size], last = rate, trial
        if len(rates) > 2 and rate < best_before * (2 - SUFFICIENT):
            break
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= SUFFICIENT * best), last


def _seconds(trial: Trial) -> float:
    """Return the seconds of the fastest call, since other work on the machine can only slow one down."""
    for _ in range(2):  # the first call of a shape sets things up
        trial()
    times: list[float] = []
    while sum(times) < TRIAL_SECONDS or not times:
        _synchronize()
        started = time.perf_counter()
        trial()
        _synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _make_tick(model: LatentDiffusion, params: SamplingParams, size: int) -> Trial:
    """Return one UNet call over `size` full slots."""
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


def _make_decode(model: LatentDiffusion, params: SamplingParams, size: int) -> Trial:
    """Return one decoder call over `size` images."""
    latents = torch.zeros(size, *model.latent_shape(params.height, params.width), device=model.device)
    return lambda: model.decode(latents)


def _make_request(params: SamplingParams, prompt: str = "") -> PromptRequest:
    return PromptRequest("trial", 0, prompt, None, 0, params, Source("", 0), "")
