"""What a model family is asked for by the chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from batch_infer.diffusion import Context, Solver
from batch_infer.records import PromptRequest


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A row's part in the UNet call (conditional and, with guidance, unconditional), and its prompt's tokens.

    `prompt_tokens` counts the prompt's own, without start, end and padding; `prompt_truncated` says that some of them
    did not fit the text encoder. None where that is not known.
    """

    context: tuple[Context, Context | None]
    prompt_tokens: int | None
    prompt_truncated: bool | None


class LatentDiffusion(Protocol):
    """A loaded checkpoint. Every method computes at one fixed, padded batch shape, whatever it is handed."""

    device: torch.device
    dtype: torch.dtype
    solver: Solver
    safety_checker: Any | None
    feature_extractor: Any | None
    pipeline: Any
    """diffusers' own, around the same networks; without a UNet where diffusers has none like this one."""

    @property
    def networks(self) -> Sequence[torch.nn.Module]:
        """Those that are called at one fixed shape an image size: they may be compiled."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of this size in pixels."""
        ...

    def condition(self, requests: Sequence[PromptRequest]) -> list[Conditioning]:
        """Encode the prompts of some rows."""
        ...

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        """One UNet call over all slots: sample (N, C, h, w), timestep (N,), context tensors (N, ...)."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) float32, not clamped: 0 is black and 1 is white."""
        ...
