"""Stable Diffusion 3 and 3.5 checkpoints (Esser et al., arXiv 2403.03206): a transformer under flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from batch_infer.diffusion import Context, Solver
from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.embeddings import TextEmbeddings
from batch_infer.models.family import Conditioning
from batch_infer.models.loading import load_module, load_network, load_pipeline, make_solver
from batch_infer.models.tokens import TokenCounter
from batch_infer.models.untrusted import read_object
from batch_infer.records import PromptRequest

MODULES = {
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
}
LARGE = "text_encoder_3"
"""T5, which a checkpoint may do without: what it would say of a text is then nothing."""
WITHOUT = {"image_encoder": None, "feature_extractor": None}


class StableDiffusion3:
    """A loaded Stable Diffusion 3 checkpoint. It has a guidance rescale here, which diffusers' pipeline has not."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.pipeline: Any = pipeline
        self.solver = make_solver(pipeline)
        self.safety_checker: Any | None = None
        self.feature_extractor: Any | None = None
        self._transformer, self._vae = pipeline.transformer, pipeline.vae
        # Not T5's: it reads on where the other two, which count alike, have stopped.
        self._counter = TokenCounter(pipeline.tokenizer, pipeline.tokenizer_2)
        self._factor: int = pipeline.vae_scale_factor
        self._embeddings = TextEmbeddings(self._encode)

    @classmethod
    def load(cls, card: ModelCard, device: torch.device, dtype: torch.dtype) -> StableDiffusion3:
        """Load from a folder, safetensors only. Raises ModelError."""
        _refuse_variations(read_object(card.path / "transformer" / "config.json", card.name), card)
        modules: dict[str, Any] = {name: load_module(kind, card, name, dtype) for name, kind in MODULES.items()}
        if (card.path / LARGE).is_dir():
            # In float16 some of it would overflow: loaded with the dtype, it keeps that in float32.
            modules[LARGE] = load_network(T5EncoderModel, card, LARGE, dtype=dtype)
        else:
            modules |= {LARGE: None, "tokenizer_3": None}
        pipeline = load_pipeline(StableDiffusion3Pipeline, card, modules | WITHOUT)
        pipeline.to(device)
        return cls(pipeline, device, dtype)

    @property
    def networks(self) -> Sequence[torch.nn.Module]:
        return self._transformer, self._vae.decoder

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self._transformer.config.in_channels, height // self._factor, width // self._factor

    @torch.inference_mode()
    def condition(self, requests: Sequence[PromptRequest]) -> list[Conditioning]:
        guided = [request for request in requests if request.params.uses_guidance]
        texts = {request.prompt for request in requests} | {request.negative_prompt or "" for request in guided}
        embeddings = self._embeddings.of(texts)
        counts = self._counter.count([request.prompt for request in requests])
        found = []
        for request, count in zip(requests, counts, strict=True):
            negative = embeddings[request.negative_prompt or ""] if request.params.uses_guidance else None
            context = embeddings[request.prompt], negative
            found.append(Conditioning(context, count, count > self._counter.longest))
        return found

    @torch.inference_mode()
    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        output: torch.Tensor = self._transformer(sample, timestep=timestep, **context, return_dict=False)[0]
        return output

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._vae.config
        scaled = latents.to(self.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
        images: torch.Tensor = self._vae.decode(scaled, return_dict=False)[0]
        return images.float() / 2 + 0.5

    def _encode(self, texts: Sequence[str]) -> list[Context]:
        """Each text's embeddings (77 + 256, width of T5), and the first two encoders' pooled ones (their widths)."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), None, None, device=self.device, do_classifier_free_guidance=False
        )
        return [
            {"encoder_hidden_states": embedding, "pooled_projections": whole}
            for embedding, whole in zip(embeddings.to(self.dtype).unbind(), pooled.to(self.dtype).unbind(), strict=True)
        ]


def load_solver(card: ModelCard) -> Solver:
    """The checkpoint's sampler, made as the whole pipeline would make it. Raises ModelError."""
    without = dict.fromkeys([*MODULES, LARGE, "tokenizer", "tokenizer_2", "tokenizer_3"])
    return make_solver(load_pipeline(StableDiffusion3Pipeline, card, without | WITHOUT))


def _refuse_variations(config: Mapping[str, Any], card: ModelCard) -> None:
    channels, given = config.get("in_channels", 16), config.get("out_channels", 16)
    if channels != given:
        raise ModelError(
            f"{card.path}: its transformer takes {channels} channels and gives {given}, so it is no text-to-image "
            "checkpoint"
        )
