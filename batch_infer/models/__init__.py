"""Models: what a checkpoint is, told without loading it, and the families that can run it.

This file, `card` and `tokens` import no torch, so that a command that renders nothing starts at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batch_infer.errors import ModelError
from batch_infer.models.card import DEMO_MODEL, ModelCard, read_card
from batch_infer.models.tokens import TokenCounter, TruncationCount

if TYPE_CHECKING:
    import torch

    from batch_infer.diffusion import Solver
    from batch_infer.models.family import Conditioning, Family

__all__ = [
    "DEMO_MODEL",
    "Conditioning",
    "Family",
    "ModelCard",
    "TokenCounter",
    "TruncationCount",
    "load",
    "load_solver",
    "load_token_counter",
    "read_card",
]


def load(card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool) -> Family:
    """Load a checkpoint on a device. Raises ModelError, in one sentence, for what cannot be loaded."""
    match card.family:
        case "stable_diffusion":
            from batch_infer.models.stable_diffusion import StableDiffusion

            return StableDiffusion.load(card, device, dtype, with_checker=with_checker)
        case other:
            raise ModelError(f"{card.name}: no family {other}")


def load_solver(card: ModelCard) -> Solver:
    """The sampler of a checkpoint without its networks. Raises ModelError."""
    match card.family:
        case "stable_diffusion":
            from batch_infer.models.stable_diffusion import load_solver

            return load_solver(card)
        case other:
            raise ModelError(f"{card.name}: no family {other}")


def load_token_counter(card: ModelCard) -> TokenCounter:
    """What counts a prompt's tokens as the checkpoint will, without torch. Raises ModelError."""
    match card.family:
        case "stable_diffusion":
            from batch_infer.models.tokens import load_clip

            return TokenCounter(load_clip(card.path / "tokenizer"))
        case other:
            raise ModelError(f"{card.name}: no family {other}")
