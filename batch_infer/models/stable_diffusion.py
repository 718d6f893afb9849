"""Stable Diffusion 1.x and 2.x checkpoints (Rombach et al., arXiv 2112.10752), epsilon or v-prediction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPTextModel

from batch_infer.diffusion import Context, Solver
from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.family import Conditioning
from batch_infer.models.loading import load_module, load_pipeline
from batch_infer.models.tokens import TokenCounter
from batch_infer.records import PromptRequest

MODULES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}

TEXT_BATCH = 8
"""Prompts in one text encoder call, padded: another batch size would move the embeddings by 1e-8."""
TEXTS_KEPT = 256
"""Embeddings kept for rows that share a text, the empty negative prompt above all."""


class StableDiffusion:
    """A loaded Stable Diffusion 1.x or 2.x checkpoint."""

    def __init__(self, pipeline: StableDiffusionPipeline, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.solver = Solver(pipeline.scheduler)
        self.safety_checker: Any | None = pipeline.safety_checker
        self.feature_extractor: Any | None = pipeline.feature_extractor
        self._unet, self._vae = pipeline.unet, pipeline.vae
        self._tokenizer, self._text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self._counter = TokenCounter(pipeline.tokenizer)
        self._factor: int = pipeline.vae_scale_factor
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    @classmethod
    def load(cls, card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool) -> StableDiffusion:
        """Load from a folder, safetensors only. Raises ModelError."""
        _refuse_variations(UNet2DConditionModel.load_config(card.path / "unet", local_files_only=True), card)
        modules: dict[str, Any] = {name: load_module(kind, card, name, dtype) for name, kind in MODULES.items()}
        if with_checker:
            modules["safety_checker"] = load_module(StableDiffusionSafetyChecker, card, "safety_checker", dtype)
        else:
            modules |= {"safety_checker": None, "requires_safety_checker": False}
        pipeline = load_pipeline(StableDiffusionPipeline, card, modules)
        pipeline.to(device)
        return cls(pipeline, device, dtype)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self._unet.config.in_channels, height // self._factor, width // self._factor

    @torch.inference_mode()
    def condition(self, requests: Sequence[PromptRequest]) -> list[Conditioning]:
        negatives = [request.negative_prompt or "" for request in requests]
        self._encode({request.prompt for request in requests} | set(negatives))
        counts = self._counter.count([request.prompt for request in requests])
        found = []
        for request, negative, count in zip(requests, negatives, counts, strict=True):
            context = (
                {"encoder_hidden_states": self._kept[request.prompt]},
                {"encoder_hidden_states": self._kept[negative]} if request.params.guided else None,
            )
            found.append(Conditioning(context, count, count > self._counter.longest))
        self._forget()
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

    def _encode(self, texts: set[str]) -> None:
        """Make sure of the embeddings (77, width) of these texts, by text encoder calls of one fixed shape."""
        for text in texts & self._kept.keys():
            self._kept.move_to_end(text)
        missing = sorted(texts - self._kept.keys())
        for start in range(0, len(missing), TEXT_BATCH):
            batch = missing[start : start + TEXT_BATCH]
            padded = batch + [""] * (TEXT_BATCH - len(batch))
            tokens = self._tokenizer(
                padded, padding="max_length", max_length=self._tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            )  # fmt: skip
            use_mask = getattr(self._text_encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(self.device) if use_mask else None
            embeddings = self._text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
            self._kept.update(zip(batch, embeddings.to(self.dtype).unbind(), strict=False))

    def _forget(self) -> None:
        while len(self._kept) > TEXTS_KEPT:
            self._kept.popitem(last=False)


def load_solver(card: ModelCard) -> Solver:
    """The checkpoint's sampler, made as the whole pipeline would make it. Raises ModelError."""
    without = dict.fromkeys([*MODULES, "tokenizer", "safety_checker", "feature_extractor"])
    pipeline = load_pipeline(StableDiffusionPipeline, card, {**without, "requires_safety_checker": False})
    return Solver(pipeline.scheduler)


def _refuse_variations(config: Mapping[str, Any], card: ModelCard) -> None:
    """UNets of this class that want more than a sample, a timestep and a text."""
    for option in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type"):
        if (value := config.get(option)) is not None:
            raise ModelError(f"{card.path}: a UNet with {option}={value} is no Stable Diffusion 1.x or 2.x")
    if (channels := config.get("in_channels", 4)) != config.get("out_channels", 4):
        raise ModelError(f"{card.path}: its UNet takes {channels} channels, so it is no text-to-image checkpoint")
