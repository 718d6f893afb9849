"""Safety checks of rendered images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from batch_infer.records import Verdict

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Judge"]


class Judge(Protocol):
    """Says of images what it thinks of them; `images` are (H, W, 3) uint8, all of one size."""

    name: str

    def judge(self, images: Sequence[np.ndarray]) -> list[Verdict]: ...
