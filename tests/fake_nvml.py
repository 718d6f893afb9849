"""Replace nvidia-ml-py by a module with the same names, whose GPUs have counters that the test sets."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


class NVMLError(Exception):
    """The base class of the driver's errors."""


class Driver(ModuleType):
    """The functions of pynvml that batch-infer calls. `counters` has the millijoules of each GPU by UUID."""

    NVMLError = NVMLError
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, **counters: int | None) -> None:
        super().__init__("pynvml")
        self.counters: dict[str, int | None] = {f"GPU-{name}": value for name, value in counters.items()}
        self.divided: set[str] = set()

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.counters:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if not self.divided:
            raise NVMLError("Not Supported")
        return [int(handle in self.divided), 0]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if (counter := self.counters[handle]) is None:
            raise NVMLError("Not Supported")
        return counter


def use_gpu(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    """Let torch say that this process computes on the GPU with this UUID, as torch spells it."""
    properties: Any = SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def install(monkeypatch: pytest.MonkeyPatch, driver: ModuleType | None) -> None:
    """Let `import pynvml` return this module, or fail if it is None."""
    monkeypatch.setitem(sys.modules, "pynvml", driver)
