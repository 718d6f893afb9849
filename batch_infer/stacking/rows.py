"""Define rows in progress and their calls of networks, and switch autocast between rows."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from greenlet import greenlet

from batch_infer.stacking.networks import Network

Tag = TypeVar("Tag")
Autocast: TypeAlias = "tuple[str, torch.dtype] | None"
"""Device type and dtype of an active torch.autocast. It belongs to the thread, so it must be switched with the row."""


@dataclass(frozen=True, slots=True)
class EndedRow(Generic[Tag]):
    """A row whose pipeline call has ended, with its result or error, and the seconds since its admission."""

    tag: Tag
    result: Any
    error: Exception | None
    seconds: float


@dataclass(eq=False, slots=True)
class Call(Generic[Tag]):
    """A call that waits to be made.

    `signature` is None if it cannot be stacked. `content` identifies the arguments of a text encoder's call.
    """

    row: Row[Tag]
    network: Network
    arguments: dict[str, Any]
    signature: Hashable
    elements: int
    autocast: Autocast
    content: Hashable = None

    @property
    def group(self) -> Hashable:
        """A key that calls share if they can be stacked."""
        if self.signature is None:
            return id(self)
        return self.network.name, self.signature, self.autocast


@dataclass(eq=False, slots=True)
class Row(Generic[Tag]):
    """A row in progress. `elements` are the batch elements of its denoiser call, or 0 if it waits for no denoiser."""

    tag: Tag
    greenlet: greenlet
    call: Call[Tag] | None = None
    elements: int = 0
    admitted: float | None = None
    """When the row was admitted to the slots, by time.perf_counter."""
    paused_at: int = 0
    """The number of ticks before the row was admitted or paused at its call."""
    result: Any = None
    error: Exception | None = None
    last_tensors: dict[str, dict[str, tuple[Any, int, int]]] = field(default_factory=dict)
    """Tensors of the last call of each network. See Signatures.of."""

    @property
    def is_denoising(self) -> bool:
        return self.admitted is not None and self.call is not None and self.call.network.kind == "denoise"


def get_autocast(device: torch.device) -> Autocast:
    kind = device.type
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


@contextmanager
def autocast(state: Autocast) -> Iterator[None]:
    """Set autocast to that of a row, and restore the caller's afterwards."""
    before = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in ("cpu", "cuda")]
    if state is not None:
        torch.set_autocast_dtype(*state)
        torch.set_autocast_enabled(state[0], True)
    try:
        yield
    finally:
        for kind, dtype, is_enabled in before:
            torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_enabled(kind, is_enabled)
