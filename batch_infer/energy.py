"""Measure the energy of NVIDIA GPUs by the counters of their driver, with nvidia-ml-py (import name: pynvml)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

MILLIJOULES_PER_WH = 3_600_000


@dataclass(frozen=True, slots=True)
class EnergyReading:
    """A device's energy counter in millijoules when rendering began, and later. `device` is the UUID of a GPU."""

    device: str
    start_mj: int
    end_mj: int


class EnergyMeter:
    """Reads the energy counter of the GPU on which this process computes, from when the meter is made.

    The counter is that of the whole GPU, including what other processes compute on it.
    """

    def __init__(self, device: str) -> None:
        """Start to measure on a device of torch: `cuda` or `cpu`."""
        self._read, self._start = None, None
        if device == "cuda" and (counter := _open_counter()) is not None:
            uuid, self._read = counter
            if (millijoules := self._read()) is not None:
                self._start = EnergyReading(uuid, millijoules, millijoules)

    def read(self) -> EnergyReading | None:
        """Return the counter at the start and now, or None if the device has none that can be read."""
        if self._read is None or self._start is None or (millijoules := self._read()) is None:
            return None
        return replace(self._start, end_mj=millijoules)


def _open_counter() -> tuple[str, Callable[[], int | None]] | None:
    """Return the UUID of this process's GPU and a function that reads its counter in mJ.

    Return None without nvidia-ml-py or NVIDIA's driver, and for a part of a GPU (MIG), which has no separate counter.
    A GPU older than Volta has a UUID, but its counter cannot be read.
    """
    try:
        import pynvml
    except ImportError:
        return None
    import torch

    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)  # NVML ignores CUDA_VISIBLE_DEVICES, so an index would not do
    except pynvml.NVMLError:
        return None
    try:
        is_divided = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:  # a GPU that cannot be divided
        is_divided = False
    return None if is_divided else (uuid, partial(_read_counter, handle))


def _read_counter(handle: object) -> int | None:
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except pynvml.NVMLError:
        return None


def sum_energy(readings: Iterable[EnergyReading | None]) -> float | None:
    """Return the energy of all devices in Wh, or None if that of one is unknown or no counter has moved.

    Workers may share a device, one after another or at the same time: count each part of the counter's range once. So
    a counter that restarted, with the driver, counts as another range.
    """
    ranges: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for reading in readings:
        if reading is None:
            return None
        ranges[reading.device].append((reading.start_mj, reading.end_mj))
    total = sum(map(_union_length, ranges.values()))
    return total / MILLIJOULES_PER_WH if total else None


def _union_length(ranges: Iterable[tuple[int, int]]) -> int:
    """Return the number of values that at least one range covers."""
    length, covered_to = 0, 0
    for start, end in sorted(ranges):
        length += max(0, end - max(start, covered_to))
        covered_to = max(covered_to, end)
    return length
