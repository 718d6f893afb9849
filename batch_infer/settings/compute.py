"""Where and how a run computes: as it is asked for, and once that is settled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
"""Checked where run.json is read."""


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """None: kept from run.json where the run goes on, else chosen for the device."""

    slots: Count | Literal["auto"] | None = None
    threads: Count | None = None
    compiled: bool | None = None
    processes: int | None = None
    """Of workers, each with a device of its own; 0: the command renders by itself. Bytes do not depend on it."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a run computes on: `cpu` or `cuda`, what its maker calls it, and how many of them there are for it."""

    kind: str
    name: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Batch sizes of an image size: row-forwards in a UNet call, images in a decoder call."""

    height: Count
    width: Count
    slots: Count
    decode_batch: Count


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how a run computes, once that is settled. Bytes depend on all of it but the device's name.

    `by_size` has the batch sizes of image sizes that have their own.
    """

    device: str
    dtype: str
    slots: Count
    decode_batch: Count
    threads: Count
    device_name: str = ""
    compiled: bool = False
    by_size: tuple[BatchShape, ...] = ()

    def shape_of(self, height: int, width: int) -> BatchShape:
        """The batch sizes of an image size."""
        own = (shape for shape in self.by_size if (shape.height, shape.width) == (height, width))
        return next(own, BatchShape(height, width, self.slots, self.decode_batch))

    def with_shapes(self, shapes: Iterable[BatchShape]) -> Compute:
        """With other batch sizes for these image sizes."""
        found = {(shape.height, shape.width): shape for shape in (*self.by_size, *shapes)}
        return replace(self, by_size=tuple(found.values()))
