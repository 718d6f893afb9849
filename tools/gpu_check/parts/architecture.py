"""Measure the throughput of one architecture: the bench, the bare UNet, the decoder, and a profile of the GPU."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from batch_infer.bench.comparison import compare
from batch_infer.bench.subject import Subject, load_subject
from batch_infer.models import decode_flops, denoise_flops
from batch_infer.worker.loading import make_chain
from tools.gpu_check import subjects
from tools.gpu_check.measure import rate, shortest_seconds, synchronize
from tools.gpu_check.profiling import ProfiledTicks

if TYPE_CHECKING:
    from tools.gpu_check.recorder import Recorder

AGAINST = {"sd15": ("grouped",), "demo": ("grouped",)}
"""Baselines of the bench: plain diffusers on batches of rows with equal parameters, for one architecture."""


def run(recorder: Recorder) -> None:
    """Load and compile the model, then measure section by section."""
    settings = subjects.bench_settings(recorder, against=AGAINST.get(recorder.architecture, ()))
    subject = load_subject(settings)
    with recorder.section("first images") as results:
        results |= subjects.render_first_images(subject)
    with recorder.section("bench") as results:
        report = compare(settings, subject).as_dict()
        names = ("table", "contenders", "peak", "parity", "peak_memory", "compute", "denoiser_parameters", "versions")
        results |= {name: report[name] for name in names}
    with recorder.section("bare unet") as results:
        results |= measure_unet(subject, recorder)
    with recorder.section("decoder") as results:
        results |= measure_decoder(subject)
    if not recorder.small:
        with recorder.section("profile") as results:
            results |= profile(subject, recorder)


@torch.inference_mode()
def measure_unet(subject: Subject, recorder: Recorder) -> dict[str, Any]:
    """Time UNet calls with inputs like the packer's, and the host's time to start one."""
    model, slots = subjects.family_model(subject), subject.compute.slots
    shape = model.latent_shape(*subjects.native_size(subject))
    context = subjects.example_context(subject, slots)
    timestep = torch.full((slots,), 500.0, device=model.device)
    sample = torch.randn(slots, *shape, device=model.device).to(model.dtype)

    def call() -> torch.Tensor:
        return model.denoise(sample, timestep, context)

    seconds = shortest_seconds(call, calls=1 if recorder.small else 12, repeats=2)
    synchronize()
    started = time.perf_counter()
    call()
    host_ms = round((time.perf_counter() - started) * 1e3, 2)
    synchronize()
    row_forwards = round(slots / seconds, 2)
    figures = rate(denoise_flops(model, shape) * slots, seconds)
    return {"slots": slots, "row_forwards_per_second": row_forwards, "host_ms": host_ms, **figures}


@torch.inference_mode()
def measure_decoder(subject: Subject) -> dict[str, Any]:
    """Time decoder calls at the batch size of a run."""
    model, size = subjects.family_model(subject), subjects.native_size(subject)
    batch, shape = subject.compute.shape_of(*size).decode_batch, model.latent_shape(*size)
    latents = torch.randn(batch, *shape, device=model.device)
    seconds = shortest_seconds(lambda: model.decode(latents))
    figures = rate(decode_flops(model, shape) * batch, seconds)
    return {"batch": batch, "images_per_second": round(batch / seconds, 2), **figures}


def profile(subject: Subject, recorder: Recorder) -> dict[str, Any]:
    """Profile six ticks in the middle of a table with mixed steps, when rows come and go and images are decoded."""
    ticks = ProfiledTicks(first=14, count=6)
    chain = make_chain(subjects.family_model(subject), subject.compute, ticks.stop)
    rows = subjects.rows_for(subject, 2 * subject.compute.slots, (8, 24))
    for _ in chain.render(rows):
        pass
    summary, lines = ticks.summarize()
    text = "\n".join([f"{name}: {value}" for name, value in summary.items()] + ["", *lines]) + "\n"
    (recorder.out / f"profile-{recorder.architecture}.txt").write_text(text, encoding="utf-8")
    return {**summary, "top_kernels": lines[:8]}
