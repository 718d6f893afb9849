"""Load Stable Diffusion XL (Podell et al., arXiv 2307.01952) and distilled checkpoints such as SDXL-Turbo.

Images get no invisible watermark. diffusers would add one if the package for it is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from batch_infer.accelerator import copy_to
from batch_infer.diffusion import Context
from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.latent_diffusion import LatentDiffusion
from batch_infer.models.loading import load_components
from batch_infer.models.stable_diffusion import refuse_variations, tokenize
from batch_infer.models.untrusted import read_object
from batch_infer.records import PromptRequest, SamplingParams

NETWORKS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
SIZE_INPUTS = 6
"""Number of the UNet's size inputs: two each for the original size, the crop's top left corner and the image size."""


class StableDiffusionXL(LatentDiffusion):
    """A loaded Stable Diffusion XL checkpoint."""

    absent_components = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}
    begin_index = 0

    def __init__(
        self, pipeline: Any, denoiser: Any, device: torch.device, dtype: torch.dtype, windows: int = 1
    ) -> None:
        super().__init__(pipeline, denoiser, device, dtype, windows)
        vae = pipeline.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            # This VAE overflows in float16, so `decode` uses a float32 copy. The pipeline keeps the float16 VAE.
            self._vae = copy.deepcopy(vae).to(torch.float32)

    @classmethod
    def load_modules(cls, card: ModelCard, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        config = read_object(card.path / "unet" / "config.json", card.name)
        refuse_variations(config, card, "Stable Diffusion XL", embedding="text_time")
        modules = load_components(NETWORKS, card, dtype)
        actual = config.get("projection_class_embeddings_input_dim")
        text_width = modules["text_encoder_2"].config.projection_dim
        expected = SIZE_INPUTS * config.get("addition_time_embed_dim", 0) + text_width
        if actual != expected:
            raise ModelError(
                f"{card.path}: its UNet takes {actual} numbers besides the text, but a base checkpoint of Stable "
                f"Diffusion XL takes {expected}; is it a refiner?"
            )
        return modules["unet"], modules

    @torch.inference_mode()
    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        inputs = dict(context)
        added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids")}
        output: torch.Tensor = self.denoiser(sample, timestep, **inputs, added_cond_kwargs=added, return_dict=False)[0]
        return output

    def _encode(self, texts: Sequence[str]) -> list[Context]:
        """Return, per text, an embedding (tokens, sum of both widths) and the second encoder's pooled embedding."""
        hidden = []
        for suffix in ("", "_2"):
            network = getattr(self.pipeline, f"text_encoder{suffix}")
            tokens = tokenize(getattr(self.pipeline, f"tokenizer{suffix}"), texts)
            output = network(copy_to(self.device, tokens.input_ids), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        embeddings, pooled = torch.cat(hidden, dim=-1).to(self.dtype), output.text_embeds.to(self.dtype)
        pairs = zip(embeddings, pooled, strict=True)
        return [{"encoder_hidden_states": text, "text_embeds": projection} for text, projection in pairs]

    def _negative_prompt(self, request: PromptRequest) -> str | None:
        """Return the negative prompt. If there is none, return None if the checkpoint then uses zeros, else ''."""
        if request.negative_prompt is None and self.pipeline.config.force_zeros_for_empty_prompt:
            return None
        return request.negative_prompt or ""

    def _make_inputs(self, params: SamplingParams) -> Context:
        """Return the base class's inputs and the size inputs of an image that was neither scaled nor cropped."""
        size = (params.height, params.width)
        sizes = torch.tensor([*size, 0, 0, *size], dtype=self.dtype, device=self.device)
        return {"time_ids": sizes, **super()._make_inputs(params)}

    def _unscale(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._vae.config
        means, deviations = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if means is None or deviations is None:
            return super()._unscale(latents)
        mean, deviation = (latents.new_tensor(values).reshape(1, -1, 1, 1) for values in (means, deviations))
        scaled: torch.Tensor = latents * deviation / config.scaling_factor + mean
        return scaled
