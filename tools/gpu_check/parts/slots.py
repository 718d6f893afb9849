"""Measure the UNet's throughput against the number of slots, and the batch sizes that `--slots auto` chooses."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from batch_infer.autotune.plateau import find_plateau
from batch_infer.bench.subject import Subject, load_subject
from batch_infer.models import denoise_flops
from batch_infer.records import SamplingParams
from tools.gpu_check import subjects
from tools.gpu_check.measure import rate, shortest_seconds

if TYPE_CHECKING:
    from tools.gpu_check.recorder import Recorder

SLOTS = (4, 8, 16, 32, 64, 128, 256)


def run(recorder: Recorder) -> None:
    """Measure each number of slots, uncompiled, then run the automatic search."""
    subject = load_subject(subjects.bench_settings(recorder, compiled=False))
    size = subjects.native_size(subject)
    with recorder.section("throughput") as results:
        flop = denoise_flops(subjects.family_model(subject), subjects.family_model(subject).latent_shape(*size))
        for slots in SLOTS:
            results[str(slots)] = measure(subject, slots, flop)
    torch.cuda.empty_cache()
    with recorder.section("auto") as results:
        started = time.perf_counter()
        choice = find_plateau(subjects.family_model(subject), SamplingParams(*size, 20, 7.5, 0.0))
        seconds = round(time.perf_counter() - started, 1)
        results |= {"slots": choice.slots, "decode_batch": choice.decode_batch, "seconds": seconds}


@torch.inference_mode()
def measure(subject: Subject, slots: int, flop: int) -> dict[str, Any]:
    """Time UNet calls with this number of slots, and report peak memory. `flop`: FLOP per batch element."""
    model = subjects.family_model(subject)
    shape = model.latent_shape(*subjects.native_size(subject))
    context = subjects.example_context(subject, slots)
    sample = torch.randn(slots, *shape, device=model.device).to(model.dtype)
    timestep = torch.full((slots,), 500.0, device=model.device)
    torch.cuda.reset_peak_memory_stats()
    seconds = shortest_seconds(lambda: model.denoise(sample, timestep, context))
    peak_gib = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    figures = rate(flop * slots, seconds)
    return {"row_forwards_per_second": round(slots / seconds, 1), "peak_gib": peak_gib, **figures}
