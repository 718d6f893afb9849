"""Stable Diffusion 1.x and 2.x checkpoints (Rombach et al., arXiv 2112.10752), epsilon or v-prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from batch_infer.accelerator import copy_to
from batch_infer.diffusion import Context, Solver
from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.embeddings import TextEmbeddings, load_long_prompts
from batch_infer.models.family import Conditioning
from batch_infer.models.fusing import fuse_loras
from batch_infer.models.loading import load_checker, load_module, load_pipeline, make_solver
from batch_infer.models.tokens import TokenCounter
from batch_infer.models.untrusted import read_object
from batch_infer.records import PromptRequest

MODULES = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel}


class TextEncoder:
    """A checkpoint's own tokenizer and text encoder: what does not fit into 77 tokens is cut off."""

    def __init__(self, pipeline: Any, dtype: torch.dtype) -> None:
        self._tokenizer, self._network, self._dtype = pipeline.tokenizer, pipeline.text_encoder, dtype

    def __call__(self, texts: Sequence[str]) -> list[Context]:
        """Each text's embedding (77, width)."""
        tokens = self._tokenizer(
            texts, padding="max_length", max_length=self._tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        device, use_mask = self._network.device, getattr(self._network.config, "use_attention_mask", False)
        mask = copy_to(device, tokens.attention_mask) if use_mask else None
        embeddings = self._network(copy_to(device, tokens.input_ids), attention_mask=mask)[0]
        return [{"encoder_hidden_states": embedding} for embedding in embeddings.to(self._dtype).unbind()]


class StableDiffusion:
    """A loaded Stable Diffusion 1.x or 2.x checkpoint, or a latent consistency model distilled from one."""

    def __init__(
        self, pipeline: StableDiffusionPipeline, unet: Any, device: torch.device, dtype: torch.dtype, windows: int = 1
    ) -> None:
        """`pipeline` holds everything but the UNet, which need not be diffusers' own."""
        self.device, self.dtype = device, dtype
        self.pipeline: Any = pipeline
        self.solver = make_solver(pipeline)
        self.safety_checker: Any | None = pipeline.safety_checker
        self.feature_extractor: Any | None = pipeline.feature_extractor
        self._unet, self._vae = unet, pipeline.vae
        long = load_long_prompts(pipeline, dtype, windows)
        self._counter = long or TokenCounter(pipeline.tokenizer)
        self._factor: int = pipeline.vae_scale_factor
        self._embeddings = TextEmbeddings(long or TextEncoder(pipeline, dtype))

    @classmethod
    def load(cls, card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool) -> StableDiffusion:
        """Load from a folder, safetensors only. Raises ModelError."""
        unet = cls.load_unet(card, dtype)
        modules: dict[str, Any] = {name: load_module(kind, card, name, dtype) for name, kind in MODULES.items()}
        if with_checker:
            modules["safety_checker"], modules["feature_extractor"] = load_checker(card, device, dtype)
        else:
            modules |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        # diffusers looks at the UNet's class, and takes no other than the one that model_index.json names.
        modules["unet"] = unet if isinstance(unet, UNet2DConditionModel) else None
        pipeline = load_pipeline(_kind(card), card, modules)
        fuse_loras(pipeline, card)
        pipeline.to(device)
        return cls(pipeline, unet.to(device), device, dtype, card.windows)

    @staticmethod
    def load_unet(card: ModelCard, dtype: torch.dtype) -> Any:
        """What is called with a sample, a timestep and a text's embedding. Raises ModelError."""
        config = read_object(card.path / "unet" / "config.json", card.name)
        refuse_variations(config, card, "Stable Diffusion 1.x or 2.x")
        return load_module(UNet2DConditionModel, card, "unet", dtype)

    @property
    def networks(self) -> Sequence[torch.nn.Module]:
        return self._unet, self._vae.decoder

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self._unet.config.in_channels, height // self._factor, width // self._factor

    @torch.inference_mode()
    def condition(self, requests: Sequence[PromptRequest]) -> list[Conditioning]:
        guided = [request for request in requests if request.params.uses_guidance]
        texts = {request.prompt for request in requests} | {request.negative_prompt or "" for request in guided}
        embeddings = self._embeddings.of(texts)
        counts = self._counter.count([request.prompt for request in requests])
        found = []
        for request, count in zip(requests, counts, strict=True):
            scale = embed_guidance(self.pipeline, self._unet, request.params.guidance_scale, self.dtype)
            negative = {**embeddings[request.negative_prompt or ""], **scale} if request.params.uses_guidance else None
            context = {**embeddings[request.prompt], **scale}, negative
            found.append(Conditioning(context, count, count > self._counter.longest))
        return found

    @torch.inference_mode()
    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        output: torch.Tensor = self._unet(sample, timestep, **context, return_dict=False)[0]
        return output

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = latents.to(self.dtype) / self._vae.config.scaling_factor
        images: torch.Tensor = self._vae.decode(scaled, return_dict=False)[0]
        return images.float() / 2 + 0.5


def load_solver(card: ModelCard) -> Solver:
    """The checkpoint's sampler, made as the whole pipeline would make it. Raises ModelError."""
    without = dict.fromkeys(["unet", *MODULES, "tokenizer", "safety_checker", "feature_extractor"])
    pipeline = load_pipeline(_kind(card), card, {**without, "requires_safety_checker": False})
    return make_solver(pipeline)


def _kind(card: ModelCard) -> Any:
    """diffusers' class for a checkpoint: one mends old scheduler settings where the other takes them as they are."""
    distilled = card.pipeline == LatentConsistencyModelPipeline.__name__
    return LatentConsistencyModelPipeline if distilled else StableDiffusionPipeline


def embed_guidance(pipeline: Any, unet: Any, scale: float, dtype: torch.dtype) -> Context:
    """What a UNet is told of the guidance scale that was distilled into it; nothing where it is not of that kind.

    Meng et al., arXiv 2210.03142; diffusers counts the scale from 1, and these UNets from 0.
    """
    width = getattr(unet.config, "time_cond_proj_dim", None)
    if width is None:
        return {}
    embedding = pipeline.get_guidance_scale_embedding(torch.tensor([scale - 1]), embedding_dim=width)
    return {"timestep_cond": embedding[0].to(unet.device, dtype)}


def refuse_variations(config: Mapping[str, Any], card: ModelCard, family: str, added: str | None = None) -> None:
    """UNets of this class that want something else than a family's, whose `addition_embed_type` is `added`."""
    for option, wanted in (("class_embed_type", None), ("addition_embed_type", added), ("encoder_hid_dim_type", None)):
        if (value := config.get(option)) != wanted:
            raise ModelError(f"{card.path}: a UNet with {option}={value} is no {family}")
    if (channels := config.get("in_channels", 4)) != config.get("out_channels", 4):
        raise ModelError(f"{card.path}: its UNet takes {channels} channels, so it is no text-to-image checkpoint")
