"""What the chain gives: images with what was said of them, and rows without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

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
    """A row that gave no image, and why: `invalid` where it asks for what cannot be had, `blocked` by its prompt."""

    request: PromptRequest
    status: Literal["invalid", "failed", "blocked"]
    error: str
    verdict: Verdict = Verdict()


Elsewhere: TypeAlias = "Callable[[], Iterable[Rendered | Unrendered]]"
"""Gives outcomes that have become ready outside of a chain."""


def nothing() -> Iterable[Rendered | Unrendered]:
    return ()


def not_finite(params: SamplingParams, dtype: torch.dtype) -> str:
    """Why a row whose image holds values that are no numbers has failed."""
    advice = "" if dtype == torch.float32 else ", or compute with --dtype float32"
    return (
        f"the model gave values that are not finite at {params.num_inference_steps} steps and guidance_scale "
        f"{params.guidance_scale:g}; try other values{advice}"
    )
