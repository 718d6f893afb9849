"""The fixed batch sizes of a run, and how they shrink where the device's memory does not hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from batch_infer.chain.outcomes import Size

Part = Literal["denoise", "decode"]


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Row-forwards in a UNet call, and images in a decoder and checker call.

    `by_size` has those of image sizes (height, width) that have batch sizes of their own.
    """

    slots: int
    decode: int
    by_size: Mapping[Size, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for slots, decode in ((self.slots, self.decode), *self.by_size.values()):
            if slots < 2 or decode < 1:
                raise ValueError(
                    f"{self}: a row with guidance takes two slots, and its image a place in a decoder call"
                )

    def of(self, size: Size) -> tuple[int, int]:
        """The slots and the decoder batch of an image size."""
        return self.by_size.get(size, (self.slots, self.decode))

    def shrunk(self, size: Size, part: Part) -> BatchSizes | None:
        """With half the slots for this size, or half the decoder batch where `part` says so or the slots are few.

        None where there is no less.
        """
        slots, decode = self.of(size)
        if slots < 4 and decode < 2:
            return None
        halve_slots = decode < 2 or (part == "denoise" and slots >= 4)
        fewer = (slots // 2, decode) if halve_slots else (slots, decode // 2)
        return replace(self, by_size={**self.by_size, size: fewer})
