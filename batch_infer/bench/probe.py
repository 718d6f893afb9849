"""Define what the benchmark asks of a model: the cost of rows, full batches, and the plain call of its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch

from batch_infer.records import PromptRequest

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion


@dataclass(frozen=True, slots=True)
class FullBatch:
    """A denoiser call with all slots full. `elements` counts its batch elements."""

    elements: int
    call: Callable[[], object]


class ModelProbe(Protocol):
    """Answers the benchmark's questions about a model, and calls its diffusers pipeline as a script would.

    `can_group`: whether the pipeline renders several prompts per call, with images as from separate calls.
    """

    pipeline: Any
    denoiser: torch.nn.Module
    scheduler_name: str
    can_group: bool

    def count_evaluations(self, request: PromptRequest) -> int:
        """Return the batch elements of all denoiser calls of a row. Raises RowError if the model rejects the row."""
        ...

    def count_flops(self, request: PromptRequest) -> tuple[int, int]:
        """Return the FLOP of one denoiser evaluation (one batch element), and of decoding one image, at a row's size.

        Only matrix products, including those of attention, and convolutions count, with two FLOP per multiply-add.
        """
        ...

    def fill_batch(self, request: PromptRequest, slots: int) -> FullBatch:
        """Return a denoiser call whose batch elements all belong to rows like this one.

        Raises torch.OutOfMemoryError.
        """
        ...

    def call_pipeline(self, requests: Sequence[PromptRequest]) -> np.ndarray:
        """Render rows with equal parameters in one pipeline call, to pixels (N, H, W, 3) uint8 on the host.

        Each row has its own generator. The safety checker does not run.
        """
        ...


def make_probe(model: LatentDiffusion | AnyPipeline) -> ModelProbe:
    """Return the probe of a loaded model."""
    if model.uses_pipeline_call:
        from batch_infer.bench.pipeline_probe import PipelineProbe

        return PipelineProbe(cast("AnyPipeline", model))
    from batch_infer.bench.family_probe import FamilyProbe

    return FamilyProbe(cast("LatentDiffusion", model))


def make_generator(request: PromptRequest) -> torch.Generator:
    """Return a generator that draws a row's noise."""
    return torch.Generator("cpu").manual_seed(request.seed)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Convert images (N, 3, H, W) in 0..1 to pixels (N, H, W, 3) uint8 on the host."""
    pixels: np.ndarray = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels
