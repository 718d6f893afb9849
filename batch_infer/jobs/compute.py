"""Choose the device settings of a run: slots, dtype, compilation, offloading and the number of workers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from batch_infer.errors import SettingsError
from batch_infer.models import ModelCard
from batch_infer.settings import BatchShape, Compute, Device, Offload, RunSettings

if TYPE_CHECKING:
    from batch_infer.jobs.job import Job

SLOTS = {"cpu": 16, "cuda": 32}
"""Default number of slots by kind of device."""
DECODE_BATCH = 8
"""Largest default for the number of images to decode together."""


def choose_compute(
    settings: RunSettings, device: Device, earlier: Mapping[str, Any] | None = None, card: ModelCard | None = None
) -> Compute:
    """Return the requested compute settings, else those of the earlier run, else defaults for the device.

    `dtype` is an exception: see `_choose_dtype`. `decode_batch` is derived from the slots of the first run and then
    kept. Batch sizes for specific image sizes, which were measured or halved after running out of memory, are kept
    until another number of slots is requested. Raises SettingsError if --offload is not possible.
    """
    offload = _choose_offload(settings, device)
    earlier_compute = (earlier or {}).get("compute", {})
    requested = settings.compute.slots if isinstance(settings.compute.slots, int) else None
    slots = requested or earlier_compute.get("slots") or SLOTS[device.kind]
    shapes = earlier_compute.get("by_size", ()) if requested in (None, earlier_compute.get("slots")) else ()
    if settings.compute.engine == "ray":
        default_threads = choose_actor_threads(settings, earlier)
    else:
        default_threads = max(1, count_cores() // max(1, count_workers(settings, device)))
    return Compute(
        device=device.kind,
        dtype=_choose_dtype(settings, device, earlier_compute, card),
        slots=slots,
        decode_batch=earlier_compute.get("decode_batch") or max(1, min(DECODE_BATCH, slots // 2)),
        threads=settings.compute.threads or earlier_compute.get("threads") or default_threads,
        device_name=device.name,
        compiled=_choose_compiled(settings, device, earlier_compute, card),
        by_size=tuple(BatchShape(**shape) for shape in shapes),
        offload=offload,
    )


def _choose_offload(settings: RunSettings, device: Device) -> Offload | None:
    """Return the requested offloading. Raises SettingsError for a CPU, and for options that do not work with it."""
    mode = settings.compute.offload
    if mode is None:
        return None
    if device.kind != "cuda":
        raise SettingsError(f"--offload {mode} saves GPU memory, but this run renders on a CPU: use `run` without it")
    if settings.model.long_prompts:
        raise SettingsError(f"--offload {mode} and --long-prompts do not work together: leave one out")
    if settings.model.lora_folder is not None:
        # A LoRA would be added on the CPU or on the GPU, which round differently, depending on what ran before.
        raise SettingsError(f"--offload {mode} and --lora-folder do not work together: leave one out")
    if mode == "sequential" and settings.model.quantize is not None:
        raise SettingsError(
            f"--offload sequential cannot move quantized layers: use --offload model, or leave out --quantize "
            f"{settings.model.quantize}"
        )
    return mode


def choose_actor_threads(settings: RunSettings, earlier: Mapping[str, Any] | None) -> int:
    """Return the threads of a worker on a Ray cluster: as requested, else as in the earlier run, else 1.

    The number of cores of this machine says nothing about the nodes of the cluster.
    """
    earlier_compute = {} if settings.overwrite else (earlier or {}).get("compute", {})
    return int(settings.compute.threads or earlier_compute.get("threads") or 1)


def _choose_dtype(
    settings: RunSettings, device: Device, earlier_compute: Mapping[str, Any], card: ModelCard | None
) -> str:
    """Return the requested dtype, else float32 on a CPU, and either float16 or bfloat16 on a GPU.

    Stable Diffusion 3 and models that run through their pipeline's call use bfloat16, since they often overflow in
    float16. A Stable Diffusion 3 run that began in float16, the default of earlier versions, continues in it.
    """
    if settings.model.dtype != "auto":
        return settings.model.dtype
    if device.kind != "cuda":
        return "float32"
    if card is None:
        return "float16"
    is_sd3 = card.family == "stable_diffusion_3"
    if is_sd3 and earlier_compute.get("dtype") == "float16":
        return "float16"
    return "bfloat16" if is_sd3 or card.uses_pipeline_call else "float16"


def _choose_compiled(
    settings: RunSettings, device: Device, earlier_compute: Mapping[str, Any], card: ModelCard | None
) -> bool:
    """Return whether to use torch.compile: as requested, else as in the earlier run, else on a GPU if possible.

    On a GPU, it needs Triton and a C compiler.
    """
    requested = settings.compute.compiled
    if (mode := settings.compute.offload) is not None:
        if requested or (requested is None and earlier_compute.get("compiled")):
            reason = "--compile requests" if requested else "the run in OUT uses"
            raise SettingsError(
                f"--offload {mode} does not work with torch.compile, which {reason}: leave it out, or add --no-compile"
            )
        return False
    if requested is not None:
        return requested
    if card is not None and card.uses_pipeline_call:
        # Some of these networks do not compile to one graph. Trying would take minutes.
        return bool(earlier_compute.get("compiled", False))
    compilers = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    is_possible = find_spec("triton") is not None and any(map(shutil.which, compilers))
    return bool(earlier_compute.get("compiled", device.kind == "cuda" and is_possible))


def count_workers(settings: RunSettings, device: Device) -> int:
    """Return the requested number of workers, else the number of GPUs, or 1 on a CPU.

    With 0 workers, the command itself renders.
    """
    return device.count if settings.compute.processes is None else settings.compute.processes


def count_parallel(workers: int, job: Job) -> int:
    """Return how many workers compute at the same time. On this machine's CPU, the number of cores limits them."""
    if job.compute.device == "cpu" and job.settings.compute.engine == "local":
        workers = min(workers, count_cores() // job.compute.threads)
    return max(1, workers)


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
