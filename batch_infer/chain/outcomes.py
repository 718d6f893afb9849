"""What the chain gives: images with what was said of them, rows without one, and where the time went."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from batch_infer.records import PromptRequest, SamplingParams, Verdict

if TYPE_CHECKING:
    from batch_infer.models import Conditioning

Size = tuple[int, int]
"""Height and width of an image, in pixels."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """An image (H, W, 3) uint8 with what the safety check said of it."""

    request: PromptRequest
    pixels: np.ndarray
    verdict: Verdict
    conditioning: Conditioning
    slots: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Unrendered:
    """A row that gave no image: `invalid` where the row asks for what cannot be had, else `failed`."""

    request: PromptRequest
    invalid: bool
    error: str


@dataclass(slots=True)
class Stages:
    """Where the time went, in seconds, and how full the slots were.

    `seconds` are all that went by. On a GPU the stages overlap: decoding and checking go on beside the UNet, so their
    seconds are part of its own. `began` and `ended`: the first UNet call's start and the last one's end.
    """

    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    check: float = 0.0
    seconds: float = 0.0
    images: int = 0
    row_forwards: int = 0
    slot_ticks: int = 0
    ticks: int = 0
    began: float = math.inf
    ended: float = -math.inf

    def __add__(self, other: Stages) -> Stages:
        both = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Stages)}
        return Stages(**{**both, "began": min(self.began, other.began), "ended": max(self.ended, other.ended)})

    @property
    def occupancy(self) -> float:
        """Row-forwards done over row-forwards computed."""
        return self.row_forwards / self.slot_ticks if self.slot_ticks else 0.0

    @property
    def busy(self) -> float:
        """The share of the time between first and last UNet call in which there was one."""
        return self.denoise / (self.ended - self.began) if self.ended > self.began else 0.0


def not_finite(params: SamplingParams, dtype: torch.dtype) -> str:
    """Why a row whose image holds values that are no numbers has failed."""
    advice = "" if dtype == torch.float32 else ", or compute with --dtype float32"
    return (
        f"the model gave values that are not finite at {params.num_inference_steps} steps and guidance_scale "
        f"{params.guidance_scale:g}; try other values{advice}"
    )
