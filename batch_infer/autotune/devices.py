"""Detect the device of this process with torch, or load it from the cache without torch."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_infer.autotune.cache import load_calibration, save_calibration
from batch_infer.errors import SettingsError, first_line
from batch_infer.models import ModelCard
from batch_infer.settings import Compute, ComputeSettings, Device, ModelSettings

NVIDIA_DRIVER = Path("/proc/driver/nvidia")
DEVICE_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "ACCELERATE_TORCH_DEVICE",
)
DEVICE_NODES = ("nvidia*", "nvidia-caps/*", "nvhost*", "kfd", "dxg", "dri/*")
"""Patterns of the files in /dev through which CUDA or ROCm accesses a GPU."""
GPU_NODES = ("/dev/nvidia", "/dev/nvhost", "/dev/kfd")
"""Prefixes of the device nodes that exist only if a GPU is visible."""


def detect_device(requested: str) -> Device:
    """Return the device for `--device`, or the device that accelerate chooses for `auto`. Imports torch.

    Raises SettingsError if the requested device is missing.
    """
    import torch
    from accelerate import PartialState

    count = _count_cuda_devices()
    if requested == "cuda" and not count:
        raise SettingsError("--device cuda: torch finds no CUDA device here")
    # On a machine without CUDA, pass `cpu`: otherwise accelerate reports a world size of one on every rank.
    kind = PartialState(cpu=requested == "cpu" or not torch.cuda.is_available()).device.type
    if kind == "cuda":
        return Device(kind, torch.cuda.get_device_name(), count)
    return Device(kind, read_processor_name())


def _count_cuda_devices() -> int:
    """Return the number of CUDA devices that workers can use.

    CUDA shows a process only the first MIG slice in CUDA_VISIBLE_DEVICES, but each worker can use a different slice.
    """
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return len(names) if count and all(name.strip().startswith("MIG-") for name in names) else count


def read_processor_name() -> str:
    """Return the model name of the CPU, or the platform's description if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@contextmanager
def explain_out_of_memory(
    model: ModelCard | ModelSettings,
    compute: Compute | ComputeSettings,
    *,
    can_quantize: bool = True,
    can_offload: bool = True,
) -> Iterator[None]:
    """Raise SettingsError instead of torch.OutOfMemoryError if a model does not fit on its device.

    The message names the options that would help and are not in use, among those that the command has. The parent
    process could not unpickle torch's error without importing torch.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = {None: "--quantize int8 or nf4", "fp8": "--quantize nf4", "int8": "--quantize nf4"}
        moved = {None: "--offload model", "model": None if model.quantize else "--offload sequential"}
        options = filter(
            None,
            (
                smaller.get(model.quantize) if can_quantize else None,
                moved.get(compute.offload) if can_offload else None,
                "another --dtype or --device",
            ),
        )
        raise SettingsError(
            f"the model does not fit into the device's memory: use {', '.join(options)}, or check what else uses that "
            f"memory ({first_line(error)})"
        ) from error


def load_device(requested: str) -> Device | None:
    """Return the device that torch detected earlier under the same conditions, or None."""
    conditions = _device_conditions(requested)
    return None if conditions is None else load_calibration(Device, conditions)


def save_device(requested: str, device: Device) -> None:
    """Save a device for later commands if its conditions can be read without torch.

    A CPU is not saved if a GPU is visible: the GPU's driver may fail now, but work later under the same conditions.
    """
    if (conditions := _device_conditions(requested)) is None:
        return
    has_gpu_node = any(node.startswith(GPU_NODES) for node in conditions["nodes"])
    if device.kind != "cpu" or not (conditions["driver"] or conditions["gpus"] or has_gpu_node):
        save_calibration(conditions, device)


def _device_conditions(requested: str) -> dict[str, Any] | None:
    """Return everything that determines the result of `detect_device`, or None if only torch can determine it.

    Unless the CPU is requested, `detect_device` uses CUDA if torch.cuda counts a device. That count and the name of
    device 0 depend on the machine, on the build of torch (version.py names its CUDA or ROCm), on the driver and its
    GPUs (the files read below change if a GPU is added, replaced or MIG-partitioned), and on the variables that hide,
    reorder or select GPUs. A container with fewer GPUs has fewer device nodes. Outside Linux, and under WSL (/dev/dxg),
    no file contains the GPU's model, so nothing is cached there. Only `plan` uses a cached device. `run` uses torch.
    """
    if sys.platform != "linux" or Path("/dev/dxg").exists():
        return None
    spec = find_spec("torch")
    origin = spec.origin if spec is not None else None
    return {
        "machine": platform.node(),
        "processor": read_processor_name(),
        "requested": requested,
        "variables": {name: os.environ.get(name) for name in DEVICE_VARIABLES},
        "torch_build": _read(Path(origin).with_name("version.py")) if origin else None,
        "driver": _read(NVIDIA_DRIVER / "version"),
        "gpus": _read_all(NVIDIA_DRIVER.glob("gpus/*/information")),
        "kfd": _read_all(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")),
        "nodes": sorted(str(node) for pattern in DEVICE_NODES for node in Path("/dev").glob(pattern)),
        **{name: version(name) for name in ("batch-infer", "torch", "accelerate")},
    }


def _read_all(files: Iterable[Path]) -> dict[str, str]:
    return {str(file): _read(file) for file in sorted(files)}


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError:
        return ""
