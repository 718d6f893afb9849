"""The local engine: one worker in this process."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

import torch
from accelerate import PartialState

from batch_infer.errors import SettingsError, first_line
from batch_infer.planning import Chunk
from batch_infer.records import ResultRow
from batch_infer.settings import Device
from batch_infer.worker import Account, Worker, WorkerSettings


def find_device(asked: str) -> Device:
    """The device that was asked for, or that accelerate finds. Raises SettingsError."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch finds no CUDA device here")
    # Left to itself, accelerate reports a world of one on every rank of a machine without CUDA.
    kind = PartialState(cpu=asked == "cpu" or not torch.cuda.is_available()).device.type
    return Device(kind, torch.cuda.get_device_name() if kind == "cuda" else _processor())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def render(
    chunks: Iterable[Chunk],
    settings: WorkerSettings,
    committed: Callable[[Sequence[ResultRow]], None],
    stop: Callable[[], bool],
) -> Account:
    """Have all chunks rendered and committed; tells what that took.

    They run as one stream: slots do not empty between them.

    Raises ModelError and SettingsError before anything is rendered, StorageError.
    """
    try:
        worker = Worker(settings, stop)
    except torch.OutOfMemoryError as error:
        raise memory_fault(error) from error
    worker.work(chain.from_iterable(chunk.requests for chunk in chunks), committed)
    return worker.account


def memory_fault(error: torch.OutOfMemoryError) -> SettingsError:
    """What to do about a device on which there is no room for the model."""
    return SettingsError(
        f"the device's memory does not hold the model: use another --dtype or device, or see what else lies on it "
        f"({first_line(error)})"
    )
