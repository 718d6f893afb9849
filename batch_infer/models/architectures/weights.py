"""Initialize random weights directly on a device, and shrink configurations for tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


@contextmanager
def initialized_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Give networks built in the context reproducible random weights, directly on a device and in a dtype.

    Outside it, they would first be initialized in float32 in host memory.
    """
    previous_dtype = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device), torch.no_grad():
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(previous_dtype)


class Sizes(NamedTuple):
    """A network's configuration: values of the released model, and values that replace some of them in a small one."""

    full: Mapping[str, Any]
    small: Mapping[str, Any]

    def at(self, small: bool) -> dict[str, Any]:
        """Return the configuration of the small or of the released network."""
        return {**self.full, **self.small} if small else dict(self.full)
