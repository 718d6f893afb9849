"""Load Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752) and latent consistency models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from batch_infer.accelerator import copy_to
from batch_infer.diffusion import Context
from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.latent_diffusion import LatentDiffusion
from batch_infer.models.loading import load_components
from batch_infer.models.untrusted import read_object

VAE_AND_ENCODER = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel}


class StableDiffusion(LatentDiffusion):
    """A loaded checkpoint of Stable Diffusion 1.x or 2.x, or a latent consistency model."""

    absent_components = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    @classmethod
    def load_modules(cls, card: ModelCard, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        config = read_object(card.path / "unet" / "config.json", card.name)
        refuse_variations(config, card, "Stable Diffusion 1.x or 2.x")
        modules = load_components({"unet": UNet2DConditionModel, **VAE_AND_ENCODER}, card, dtype)
        return modules["unet"], modules

    def _encode(self, texts: Sequence[str]) -> list[Context]:
        """Return an embedding (tokens, width) per text, usually with 77 tokens, truncating longer texts."""
        network = self.pipeline.text_encoder
        tokens = tokenize(self.pipeline.tokenizer, texts)
        use_mask = getattr(network.config, "use_attention_mask", False)
        mask = copy_to(self.device, tokens.attention_mask) if use_mask else None
        embeddings = network(copy_to(self.device, tokens.input_ids), attention_mask=mask)[0]
        return [{"encoder_hidden_states": embedding} for embedding in embeddings.to(self.dtype).unbind()]


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Tokenize texts, padding and truncating them to the tokenizer's maximum length."""
    return tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )


def refuse_variations(config: Mapping[str, Any], card: ModelCard, family: str, embedding: str | None = None) -> None:
    """Raise ModelError if a UNet's inputs are not its family's. `embedding` is the family's `addition_embed_type`."""
    expected = {"class_embed_type": None, "addition_embed_type": embedding, "encoder_hid_dim_type": None}
    for option, value in expected.items():
        if (actual := config.get(option)) != value:
            raise ModelError(f"{card.path}: a UNet with {option}={actual} is not {family}")
