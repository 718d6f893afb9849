"""Stable Diffusion XL checkpoints (Podell et al., arXiv 2307.01952), and those distilled from one to take few steps.

diffusers marks images with an invisible watermark where a package for that is installed; here none are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from batch_infer.accelerator import copy_to
from batch_infer.diffusion import Context, Solver
from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.embeddings import TextEmbeddings, load_long_prompts
from batch_infer.models.family import Conditioning
from batch_infer.models.fusing import fuse_loras
from batch_infer.models.loading import load_module, load_pipeline, make_solver
from batch_infer.models.stable_diffusion import embed_guidance, refuse_variations
from batch_infer.models.tokens import TokenCounter
from batch_infer.models.untrusted import read_object
from batch_infer.records import PromptRequest, SamplingParams

MODULES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
WITHOUT = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}
SIZES = 6
"""Numbers that the UNet is told of an image: its original size, the corner of its crop, and its size."""


class TextEncoders:
    """A checkpoint's two tokenizers and text encoders; each cuts off what does not fit into its 77 tokens."""

    def __init__(self, pipeline: Any, dtype: torch.dtype) -> None:
        self._both = (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        )
        self._dtype = dtype

    def __call__(self, texts: Sequence[str]) -> list[Context]:
        """Each text's embedding (77, width of both), and the second encoder's pooled one (projection width)."""
        hidden = []
        for tokenizer, network in self._both:
            tokens = tokenizer(
                texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            told = network(copy_to(network.device, tokens.input_ids), output_hidden_states=True)
            hidden.append(told.hidden_states[-2])
        embeddings, pooled = torch.cat(hidden, dim=-1).to(self._dtype), told.text_embeds.to(self._dtype)
        return [
            {"encoder_hidden_states": embedding, "text_embeds": whole}
            for embedding, whole in zip(embeddings.unbind(), pooled.unbind(), strict=True)
        ]


class StableDiffusionXL:
    """A loaded Stable Diffusion XL checkpoint."""

    def __init__(
        self, pipeline: StableDiffusionXLPipeline, unet: Any, device: torch.device, dtype: torch.dtype, windows: int = 1
    ) -> None:
        self.device, self.dtype = device, dtype
        self.pipeline: Any = pipeline
        self.solver = _solver(pipeline)
        self.safety_checker: Any | None = None
        self.feature_extractor: Any | None = None
        self._unet, self._vae = unet, _without_overflow(pipeline.vae)
        long = load_long_prompts(pipeline, dtype, windows)
        self._counter = long or TokenCounter(pipeline.tokenizer, pipeline.tokenizer_2)
        self._factor: int = pipeline.vae_scale_factor
        self._embeddings = TextEmbeddings(long or TextEncoders(pipeline, dtype))

    @classmethod
    def load(cls, card: ModelCard, device: torch.device, dtype: torch.dtype) -> StableDiffusionXL:
        """Load from a folder, safetensors only. Raises ModelError."""
        config = read_object(card.path / "unet" / "config.json", card.name)
        refuse_variations(config, card, "Stable Diffusion XL", added="text_time")
        modules: dict[str, Any] = {name: load_module(kind, card, name, dtype) for name, kind in MODULES.items()}
        _refuse_refiner(config, modules["text_encoder_2"].config.projection_dim, card)
        pipeline = load_pipeline(StableDiffusionXLPipeline, card, modules | WITHOUT)
        fuse_loras(pipeline, card)
        pipeline.to(device)
        return cls(pipeline, pipeline.unet, device, dtype, card.windows)

    @property
    def networks(self) -> Sequence[torch.nn.Module]:
        return self._unet, self._vae.decoder

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self._unet.config.in_channels, height // self._factor, width // self._factor

    @torch.inference_mode()
    def condition(self, requests: Sequence[PromptRequest]) -> list[Conditioning]:
        texts = {request.prompt for request in requests}
        texts |= {text for request in requests if (text := self._negative(request)) is not None}
        embeddings = self._embeddings.of(texts)
        counts = self._counter.count([request.prompt for request in requests])
        found = []
        for request, count in zip(requests, counts, strict=True):
            told, prompt, text = self._tell(request.params), embeddings[request.prompt], self._negative(request)
            negative = None
            if request.params.uses_guidance:
                nothing = {name: torch.zeros_like(part) for name, part in prompt.items()}
                negative = {**(nothing if text is None else embeddings[text]), **told}
            found.append(Conditioning(({**prompt, **told}, negative), count, count > self._counter.longest))
        return found

    @torch.inference_mode()
    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        others = dict(context)
        added = {name: others.pop(name) for name in ("text_embeds", "time_ids")}
        output: torch.Tensor = self._unet(sample, timestep, **others, added_cond_kwargs=added, return_dict=False)[0]
        return output

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._vae.config
        latents = latents.to(self._vae.dtype)
        means, deviations = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if means is not None and deviations is not None:
            mean, deviation = (latents.new_tensor(values).reshape(1, -1, 1, 1) for values in (means, deviations))
            latents = latents * deviation / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        images: torch.Tensor = self._vae.decode(latents, return_dict=False)[0]
        return images.float() / 2 + 0.5

    def _negative(self, request: PromptRequest) -> str | None:
        """The text that guidance leads away from, None for nothing at all.

        To some checkpoints a row without a negative prompt is nothing; an empty one is a text to all of them.
        """
        silent = request.negative_prompt is None and self.pipeline.config.force_zeros_for_empty_prompt
        return None if silent or not request.params.uses_guidance else request.negative_prompt or ""

    def _tell(self, params: SamplingParams) -> Context:
        """What the UNet is told of a row beside its texts: that the image is not scaled and not cropped."""
        size = (params.height, params.width)
        sizes = torch.tensor([*size, 0, 0, *size], dtype=self.dtype, device=self.device)
        return {"time_ids": sizes, **embed_guidance(self.pipeline, self._unet, params.guidance_scale, self.dtype)}


def load_solver(card: ModelCard) -> Solver:
    """The checkpoint's sampler, made as the whole pipeline would make it. Raises ModelError."""
    without = dict.fromkeys([*MODULES, "tokenizer", "tokenizer_2"])
    return _solver(load_pipeline(StableDiffusionXLPipeline, card, without | WITHOUT))


def _solver(pipeline: Any) -> Solver:
    """This pipeline tells its scheduler where to begin, where Stable Diffusion's leaves it to search."""
    return make_solver(pipeline, begin_index=0)


def _without_overflow(vae: Any) -> Any:
    """A VAE that computes in float32 where it would overflow in float16. The pipeline keeps its own as it is."""
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        return copy.deepcopy(vae).to(torch.float32)
    return vae


def _refuse_refiner(config: Mapping[str, Any], projection: int, card: ModelCard) -> None:
    wanted = config.get("projection_class_embeddings_input_dim")
    given = SIZES * config.get("addition_time_embed_dim", 0) + projection
    if wanted != given:
        raise ModelError(
            f"{card.path}: its UNet takes {wanted} numbers beside the text, and a base checkpoint of Stable Diffusion "
            f"XL takes {given} here; is it a refiner?"
        )
