"""Load models, make rows and render images for the parts, with the project's own code."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from batch_infer.bench.settings import BenchSettings, WorkloadSettings
from batch_infer.bench.subject import Subject, load_subject
from batch_infer.bench.workload import make_rows
from batch_infer.chain import BatchSizes, RenderedImage, StepLevelChain
from batch_infer.models import is_compiled
from batch_infer.records import PromptRequest
from batch_infer.settings import ComputeSettings, ModelSettings
from batch_infer.worker.loading import make_chain

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion
    from tools.gpu_check.recorder import Recorder

SLOTS = {"demo": 4, "sd15": 32, "decidiffusion": 32, "sdxl": 16}
WORKLOADS = {
    "demo": WorkloadSettings(3, (2, 2), "native", 0.0),
    "sd15": WorkloadSettings(48, (50, 50), "native", 0.0),
    "decidiffusion": WorkloadSettings(96, (30, 30), "native", 0.0),
    "sdxl": WorkloadSettings(24, (20, 20), "native", 0.0),
}
"""Rows of the bench. All have guidance, so that images/s are comparable with published figures."""


def bench_settings(recorder: Recorder, *, against: Sequence[str] = (), compiled: bool = True) -> BenchSettings:
    """Return the bench's settings for the part's architecture: float16 on a GPU, float32 on a CPU."""
    name, device = recorder.architecture, cast("Any", recorder.device)
    return BenchSettings(
        workload=WORKLOADS[name],
        model=ModelSettings(dtype="auto", device=device),
        architecture=None if name == "demo" else name,
        compute=ComputeSettings(
            slots=SLOTS[name], threads=threads_on(device), compiled=compiled and not recorder.small
        ),
        rounds=1,
        against=tuple(against),
    )


def load_demo(device: Any, dtype: Any, slots: int, *, quantize: Any = None, offload: Any = None) -> Subject:
    """Load the built-in model, uncompiled."""
    compute = ComputeSettings(slots=slots, threads=threads_on(device), compiled=False, offload=offload)
    model = ModelSettings(dtype=dtype, device=device, quantize=quantize)
    return load_subject(BenchSettings(model=model, compute=compute))


def threads_on(device: str) -> int | None:
    """Return one torch thread on a CPU, whose cores may be shared, else None for the default."""
    return 1 if device == "cpu" else None


def family_model(subject: Subject) -> LatentDiffusion:
    """Return the subject's model, which has a family in every part."""
    return cast("LatentDiffusion", subject.model)


def native_size(subject: Subject) -> tuple[int, int]:
    """Return the model's native image height and width."""
    return subject.sizes.native_height, subject.sizes.native_width


def rows_for(subject: Subject, count: int, steps: tuple[int, int], *, unguided: float = 0.0) -> list[PromptRequest]:
    """Make rows of the native size with random prompts and steps, the same ones on every call."""
    settings = WorkloadSettings(count, steps, "native", unguided)
    return make_rows(settings, [native_size(subject)], subject.defaults)


def render(model: LatentDiffusion, rows: Sequence[PromptRequest], slots: int, decode: int) -> dict[str, Any]:
    """Render rows and return pixels by id. Raises RuntimeError for a row without an image."""
    return pixels_of(list(StepLevelChain(model, BatchSizes(slots, decode), None).render(rows)))


def render_as_worker(subject: Subject, rows: Sequence[PromptRequest]) -> dict[str, Any]:
    """Render rows with a worker's chain and return pixels by id. Raises RuntimeError for a row without an image."""
    return pixels_of(list(make_chain(subject.model, subject.compute).render(rows)))


def pixels_of(outcomes: Sequence[Any]) -> dict[str, Any]:
    """Return pixels by id. Raises RuntimeError for a row without an image."""
    for outcome in outcomes:
        if not isinstance(outcome, RenderedImage):
            raise RuntimeError(f"{outcome.request.id}: {outcome.error}")
    return {outcome.request.id: outcome.pixels for outcome in outcomes}


def render_first_images(subject: Subject) -> dict[str, Any]:
    """Render half as many rows as slots, which compiles the networks, and return the duration."""
    started = time.perf_counter()
    rows = rows_for(subject, max(2, subject.compute.slots // 2), (2, 2))
    pixels_of(list(make_chain(subject.model, subject.compute).render(rows)))
    compiled = subject.compute.compiled and is_compiled(subject.model.networks)
    return {"seconds": round(time.perf_counter() - started, 1), "compiled": compiled}


@torch.inference_mode()
def example_context(subject: Subject, slots: int) -> dict[str, torch.Tensor]:
    """Return the conditioning of one row for every slot, laid out as in the packer."""
    (conditioning,) = family_model(subject).condition(rows_for(subject, 1, (2, 2)))
    return as_packed({name: value.expand(slots, *value.shape) for name, value in conditioning.context[0].items()})


@torch.inference_mode()
def as_packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors like the packer's: contiguous and in inference mode.

    torch.compile guards on both properties and would compile again for other tensors.
    """
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
