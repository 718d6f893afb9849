"""The device that a process computes on, and what to say where it cannot hold the model."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

from batch_infer.autotune.processor import processor_name
from batch_infer.errors import SettingsError, first_line
from batch_infer.settings import Device


def find_device(asked: str) -> Device:
    """The device that was asked for, or that accelerate finds. Raises SettingsError."""
    count = _device_count()
    if asked == "cuda" and not count:
        raise SettingsError("--device cuda: torch finds no CUDA device here")
    # Left to itself, accelerate reports a world of one on every rank of a machine without CUDA.
    kind = PartialState(cpu=asked == "cpu" or not torch.cuda.is_available()).device.type
    if kind == "cuda":
        return Device(kind, torch.cuda.get_device_name(), count)
    return Device(kind, processor_name())


def _device_count() -> int:
    """How many devices there are for workers of their own.

    CUDA shows a process the first MIG slice alone, however many are listed; each worker is shown one of the list.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return len(listed) if count and all(name.strip().startswith("MIG-") for name in listed) else count


def explain_out_of_memory(error: torch.OutOfMemoryError) -> SettingsError:
    """What to do about a device on which there is no room for the model."""
    return SettingsError(
        f"the device's memory does not hold the model: use another --dtype or device, or see what else lies on it "
        f"({first_line(error)})"
    )
