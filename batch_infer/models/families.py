"""Which code loads a checkpoint of each family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.layouts import SamplingRules
from batch_infer.models.tokens import TokenCounter

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from batch_infer.diffusion import Solver
    from batch_infer.models.any_pipeline import AnyPipeline
    from batch_infer.models.family import LatentDiffusion


def load_latent_diffusion(
    card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool
) -> LatentDiffusion:
    """Load a checkpoint on a device. Raises ModelError, in one sentence, for what cannot be loaded."""
    match card.family:
        case "stable_diffusion":
            from batch_infer.models.stable_diffusion import StableDiffusion

            return StableDiffusion.load(card, device, dtype, with_checker=with_checker)
        case "stable_diffusion_xl":
            from batch_infer.models.stable_diffusion_xl import StableDiffusionXL

            return StableDiffusionXL.load(card, device, dtype)
        case "stable_diffusion_3":
            from batch_infer.models.stable_diffusion_3 import StableDiffusion3

            return StableDiffusion3.load(card, device, dtype)
        case "decidiffusion":
            from batch_infer.models.decidiffusion import DeciDiffusion

            return DeciDiffusion.load(card, device, dtype, with_checker=with_checker)
        case other:
            raise ModelError(f"{card.name}: no family {other}")


def load_checker(card: ModelCard, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A checkpoint's safety checker, and what makes its inputs of images, without the rest. Raises ModelError."""
    from batch_infer.models import loading

    return loading.load_checker(card, device, dtype)


def load_any_pipeline(card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool) -> AnyPipeline:
    """The same of a checkpoint that is driven by diffusers' own pipeline. Raises ModelError."""
    from batch_infer.models.any_pipeline import AnyPipeline

    return AnyPipeline.load(card, device, dtype, with_checker=with_checker)


def inspect_pipeline(path: Path) -> SamplingRules:
    """What a checkpoint's pipeline takes, where only diffusers can tell; imports torch. Raises ModelError."""
    from batch_infer.models.pipelines import read_facts

    return read_facts(path)


def load_solver(card: ModelCard) -> Solver:
    """The sampler of a checkpoint without its networks. Raises ModelError."""
    match card.family:
        case "stable_diffusion" | "decidiffusion":
            from batch_infer.models.stable_diffusion import load_solver

            return load_solver(card)
        case "stable_diffusion_xl":
            from batch_infer.models.stable_diffusion_xl import load_solver

            return load_solver(card)
        case "stable_diffusion_3":
            from batch_infer.models.stable_diffusion_3 import load_solver

            return load_solver(card)
        case other:
            raise ModelError(f"{card.name}: no family {other}")


def load_token_counter(card: ModelCard) -> TokenCounter | None:
    """What counts a prompt's tokens as the checkpoint will, without torch; None where only its pipeline knows.

    Raises ModelError.
    """
    match card.family:
        case "stable_diffusion" | "decidiffusion":
            from batch_infer.models.tokens import load_clip

            return TokenCounter(load_clip(card.path), windows=card.windows)
        case "stable_diffusion_xl" | "stable_diffusion_3":
            from batch_infer.models.tokens import load_clip

            both = (load_clip(card.path, suffix) for suffix in ("", "_2"))
            return TokenCounter(*both, windows=card.windows)
        case "any_pipeline":
            return None
        case other:
            raise ModelError(f"{card.name}: no family {other}")
