"""Answers of the probe that are kept between commands: the device, and how often a sampler evaluates the model."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_infer.autotune import calibration
from batch_infer.autotune.processor import processor_name
from batch_infer.models import ModelCard
from batch_infer.settings import Device

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
"""Files under /dev through which CUDA or ROCm reaches a GPU."""
DEVICE_LIBRARIES = ("batch-infer", "torch", "accelerate")
SAMPLER_LIBRARIES = ("batch-infer", "torch", "diffusers")


def recall_device(requested: str) -> Device | None:
    """Return the device that torch has found under the same conditions before, or None where it must be asked."""
    conditions = _device_conditions(requested)
    if conditions is None or (found := calibration.recall_facts("device", conditions)) is None:
        return None
    try:
        return Device(str(found["kind"]), str(found["name"]), int(found["count"]))
    except (KeyError, TypeError, ValueError):
        return None


def remember_device(requested: str, device: Device) -> None:
    """Keep a device for later commands, unless its conditions cannot all be seen from outside torch.

    The CPU is not kept where a GPU is visible: a driver that fails today may work tomorrow with nothing else changed.
    """
    conditions = _device_conditions(requested)
    if conditions is not None and (device.kind != "cpu" or not _has_gpu(conditions)):
        calibration.remember_facts("device", conditions, asdict(device))


def recall_evaluations(card: ModelCard) -> dict[int, int | str]:
    """Return model evaluations by step count, or the reason why the scheduler refuses that count."""
    found = calibration.recall_facts("evaluations", _sampler_conditions(card)) or {}
    try:
        return {int(steps): answer for steps, answer in found.items() if isinstance(answer, (int, str))}
    except ValueError:
        return {}


def remember_evaluations(card: ModelCard, evaluations: Mapping[int, int | str]) -> None:
    calibration.remember_facts("evaluations", _sampler_conditions(card), dict(evaluations))


def _device_conditions(requested: str) -> dict[str, Any] | None:
    """Return all that decides which device `find_device` returns, or None where it cannot be read without torch.

    `find_device` uses CUDA where torch.cuda counts a device, and else the CPU. That count and the name of device 0
    follow from the machine, from the build of torch (version.py names its CUDA or ROCm), from the driver and its GPUs
    (the files below; an added, exchanged or MIG-partitioned GPU changes them), and from the variables that hide or
    reorder GPUs. A container that is given fewer GPUs has fewer device nodes. Outside Linux, and under WSL
    (/dev/dxg), the GPU's model is in no file, so nothing is kept there. Only `plan` uses a kept device; `run` asks
    torch.
    """
    if sys.platform != "linux" or Path("/dev/dxg").exists():
        return None
    spec = find_spec("torch")
    origin = spec.origin if spec is not None else None
    return {
        "machine": platform.node(),
        "processor": processor_name(),
        "requested": requested,
        "variables": {name: os.environ.get(name) for name in DEVICE_VARIABLES},
        "torch_build": _text(Path(origin).with_name("version.py")) if origin else None,
        "driver": _text(NVIDIA_DRIVER / "version"),
        "gpus": _texts(sorted(NVIDIA_DRIVER.glob("gpus/*/information"))),
        "kfd": _texts(sorted(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id"))),
        "nodes": sorted(str(node) for pattern in DEVICE_NODES for node in Path("/dev").glob(pattern)),
        **{name: version(name) for name in DEVICE_LIBRARIES},
    }


def _has_gpu(conditions: Mapping[str, Any]) -> bool:
    nodes = ("/dev/nvidia", "/dev/nvhost", "/dev/kfd")
    return bool(conditions["driver"] or conditions["gpus"]) or any(
        node.startswith(nodes) for node in conditions["nodes"]
    )


def _sampler_conditions(card: ModelCard) -> dict[str, Any]:
    """Return all that decides how often a row evaluates the model: not its weights, which no sampler sees."""
    return {
        "scheduler": [card.scheduler_name, card.scheduler_fingerprint],
        "family": card.family,
        "pipeline": card.pipeline,
        **{name: version(name) for name in SAMPLER_LIBRARIES},
    }


def _texts(files: Iterable[Path]) -> dict[str, str]:
    return {str(file): _text(file) for file in files}


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError:
        return ""
