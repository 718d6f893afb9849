"""The local engine: one worker in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from accelerate import PartialState

from batch_infer.chain import Stages
from batch_infer.errors import SettingsError, first_line
from batch_infer.planning import Chunk
from batch_infer.records import ResultRow
from batch_infer.worker import Worker, WorkerSettings


def find_device(asked: str) -> str:
    """`cpu` or `cuda`, as asked or as accelerate finds it. Raises SettingsError."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch finds no CUDA device here")
    # Left to itself, accelerate reports a world of one on every rank of a machine without CUDA.
    return str(PartialState(cpu=asked == "cpu" or not torch.cuda.is_available()).device.type)


def render(
    chunks: Iterable[Chunk],
    settings: WorkerSettings,
    committed: Callable[[Sequence[ResultRow]], None],
    stop: Callable[[], bool],
) -> dict[tuple[int, int], Stages]:
    """Have all chunks rendered and committed; tells where the time went, by image size (height, width).

    They run as one stream: slots do not empty between them.

    Raises ModelError before anything is rendered, SettingsError where the device's memory does not do, StorageError.
    """
    worker = Worker(settings, stop)
    try:
        worker.work(chain.from_iterable(chunk.requests for chunk in chunks), committed)
    except torch.OutOfMemoryError as error:
        raise memory_fault(settings.compute.slots, error) from error
    return worker.stages


def memory_fault(slots: int, error: torch.OutOfMemoryError) -> SettingsError:
    """What to do about a device that is too small."""
    return SettingsError(
        f"the device's memory does not hold {slots} slots at this size: use fewer --slots, smaller images or another "
        f"--dtype, and run again ({first_line(error)})"
    )
