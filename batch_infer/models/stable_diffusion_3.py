"""Load Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): a transformer trained with flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from batch_infer.diffusion import Context
from batch_infer.models.card import ModelCard
from batch_infer.models.latent_diffusion import LatentDiffusion
from batch_infer.models.loading import load_components, load_network

NETWORKS = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
}
T5 = "text_encoder_3"
"""An optional component. Without it, diffusers' pipeline uses zeros as its embeddings."""


class StableDiffusion3(LatentDiffusion):
    """A loaded Stable Diffusion 3 checkpoint. Unlike diffusers' pipeline, it supports guidance rescale."""

    absent_components = {"image_encoder": None, "feature_extractor": None}

    @classmethod
    def load_modules(cls, card: ModelCard, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        modules = load_components(NETWORKS, card, dtype)
        if (card.path / T5).is_dir():
            # Pass `dtype`, because transformers then keeps in float32 the layers that would overflow in float16.
            modules[T5] = load_network(T5EncoderModel, card, T5, dtype=dtype)
        else:
            modules |= {T5: None, "tokenizer_3": None}
        return modules["transformer"], modules

    def _encode(self, texts: Sequence[str]) -> list[Context]:
        """Return per text an embedding (77 + 256, joint_attention_dim) and both CLIP encoders' pooled embeddings."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), None, None, device=self.device, do_classifier_free_guidance=False
        )
        pairs = zip(embeddings.to(self.dtype), pooled.to(self.dtype), strict=True)
        return [{"encoder_hidden_states": text, "pooled_projections": projection} for text, projection in pairs]

    def _unscale(self, latents: torch.Tensor) -> torch.Tensor:
        return super()._unscale(latents) + (self._vae.config.shift_factor or 0.0)
