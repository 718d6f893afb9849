"""The base class of model families that are batched step by step, and the cache of their prompt embeddings."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch

from batch_infer.diffusion import Context, Solver
from batch_infer.models.card import ModelCard
from batch_infer.models.loading import load_checker, load_pipeline
from batch_infer.models.lora import fuse_loras
from batch_infer.models.schedulers import make_solver
from batch_infer.models.tokens import TokenCounter
from batch_infer.records import PromptRequest, SamplingParams

TEXT_BATCH = 8
"""Texts in one text encoder call, padded: another batch size changes embeddings by 1e-8."""
CACHE_BYTES = 128 << 20
"""Bytes of embeddings kept on the device: about 1,000 texts of Stable Diffusion in half precision, 48 of 3.5."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A row's denoiser inputs besides the sample (conditional and, with guidance, unconditional), and token count.

    `prompt_tokens` excludes start, end and padding tokens. `prompt_truncated` is whether the text encoder cuts some
    off. Both are None where unknown.
    """

    context: tuple[Context, Context | None]
    prompt_tokens: int | None
    prompt_truncated: bool | None


class EmbeddingCache:
    """The most recently used prompt embeddings, for rows that share a prompt or the empty negative prompt."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._kept: OrderedDict[str, Context] = OrderedDict()

    def get(self, texts: Iterable[str], encode: Callable[[Sequence[str]], Iterable[Context]]) -> Mapping[str, Context]:
        """Return the embeddings of these texts. `encode` is always called with TEXT_BATCH texts."""
        requested = set(texts)
        for text in requested & self._kept.keys():
            self._kept.move_to_end(text)
        missing = sorted(requested - self._kept.keys())
        for start in range(0, len(missing), TEXT_BATCH):
            batch = missing[start : start + TEXT_BATCH]
            padded = batch + [""] * (TEXT_BATCH - len(batch))
            for text, context in zip(batch, encode(padded), strict=False):
                # A view would keep the whole batch in memory.
                self._kept[text] = {name: part.clone() for name, part in context.items()}
                self._bytes += _count_bytes(self._kept[text])
        embeddings = {text: self._kept[text] for text in requested}
        while self._bytes > self._max_bytes:
            self._bytes -= _count_bytes(self._kept.popitem(last=False)[1])
        return embeddings


def _count_bytes(context: Context) -> int:
    return sum(part.nbytes for part in context.values())


class LatentDiffusion:
    """A loaded checkpoint. Every method computes at a fixed, padded batch shape, whatever the number of rows.

    A family implements `load_modules` and `_encode`, and overrides what its denoiser and VAE do differently.
    """

    absent: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the pipeline class in place of components that are not loaded."""
    begin_index: ClassVar[int | None] = None
    """Where diffusers' pipeline tells its scheduler to begin; None where the scheduler searches for it."""

    def __init__(
        self, pipeline: Any, denoiser: Any, device: torch.device, dtype: torch.dtype, windows: int = 1
    ) -> None:
        """`pipeline` holds all components but the denoiser, which need not be a class of diffusers."""
        self.pipeline, self.denoiser, self.device, self.dtype = pipeline, denoiser, device, dtype
        self.solver = make_solver(pipeline.scheduler, self.begin_index)
        self.safety_checker: Any | None = getattr(pipeline, "safety_checker", None)
        self.feature_extractor: Any | None = getattr(pipeline, "feature_extractor", None)
        self._vae = pipeline.vae
        self._embeddings = EmbeddingCache()
        # Not tokenizer_3, T5's: it sees text beyond the end of the other two, which count alike.
        tokenizers = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        self._counter: Any = TokenCounter(*filter(None, tokenizers))
        self._encoder: Callable[[Sequence[str]], list[Context]] | None = None
        if windows > 1:
            from batch_infer.models.long_prompts import LongPrompts

            self._counter = self._encoder = LongPrompts(pipeline, dtype)

    @classmethod
    def load(cls, card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool) -> LatentDiffusion:
        """Load a checkpoint from its folder, and its safety checker on request. Raises ModelError."""
        denoiser, modules = cls.load_modules(card, dtype)
        modules = {**cls.absent, **modules}
        if with_checker:
            modules["safety_checker"], modules["feature_extractor"] = load_checker(card, device, dtype)
        pipeline = load_pipeline(cls.pipeline_class(card), card, modules)
        fuse_loras(pipeline, card.loras, card.name)
        pipeline.to(device)
        return cls(pipeline, denoiser.to(device), device, dtype, card.windows)

    @classmethod
    def load_solver(cls, card: ModelCard) -> Solver:
        """Load the sampler as the whole pipeline would. Raises ModelError."""
        kind = cls.pipeline_class(card)
        arguments = inspect.signature(kind).parameters.values()
        components = [argument.name for argument in arguments if argument.default is argument.empty]
        absent = {**dict.fromkeys(name for name in components if name != "scheduler"), **cls.absent}
        return make_solver(load_pipeline(kind, card, absent).scheduler, cls.begin_index)

    @classmethod
    def pipeline_class(cls, card: ModelCard) -> Any:
        """Return the class of diffusers' pipeline around the networks."""
        return getattr(diffusers, card.pipeline)

    @classmethod
    def load_modules(cls, card: ModelCard, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """Load the denoiser, and components of the pipeline by name. Raises ModelError."""
        raise NotImplementedError

    @property
    def networks(self) -> Sequence[torch.nn.Module]:
        """Networks that are called at one fixed shape per image size, so that they can be compiled."""
        return self.denoiser, self._vae.decoder

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latents of an image of this size in pixels."""
        factor = self.pipeline.vae_scale_factor
        return self.denoiser.config.in_channels, height // factor, width // factor

    @torch.inference_mode()
    def condition(self, requests: Sequence[PromptRequest]) -> list[Conditioning]:
        """Encode the prompts of rows."""
        negatives = [self._negative_prompt(request) if request.params.uses_guidance else None for request in requests]
        texts = {request.prompt for request in requests} | {text for text in negatives if text is not None}
        embeddings = self._embeddings.get(texts, self._encoder or self._encode)
        counts = self._counter.count([request.prompt for request in requests])
        conditionings = []
        for request, text, count in zip(requests, negatives, counts, strict=True):
            prompt, extra, negative = embeddings[request.prompt], self._make_inputs(request.params), None
            if request.params.uses_guidance:
                zeros = {name: torch.zeros_like(part) for name, part in prompt.items()} if text is None else {}
                negative = {**(zeros if text is None else embeddings[text]), **extra}
            truncated = count > self._counter.max_tokens
            conditionings.append(Conditioning(({**prompt, **extra}, negative), count, truncated))
        return conditionings

    @torch.inference_mode()
    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        """Evaluate the denoiser once for all slots: sample (N, C, h, w), timestep (N,), context tensors (N, ...)."""
        output: torch.Tensor = self.denoiser(sample, timestep=timestep, **context, return_dict=False)[0]
        return output

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) in float32, not clamped: 0 is black, 1 is white."""
        images: torch.Tensor = self._vae.decode(self._unscale(latents.to(self._vae.dtype)), return_dict=False)[0]
        return images.float() / 2 + 0.5

    def _encode(self, texts: Sequence[str]) -> list[Context]:
        """Return the embeddings of each text."""
        raise NotImplementedError

    def _negative_prompt(self, request: PromptRequest) -> str | None:
        """Return the text of a guided row's unconditional input, None for zeros."""
        return request.negative_prompt or ""

    def _make_inputs(self, params: SamplingParams) -> Context:
        """Return a row's denoiser inputs besides its text: the guidance scale where it is embedded.

        Meng et al., arXiv 2210.03142. diffusers counts the scale from 1, and these UNets from 0.
        """
        width = getattr(self.denoiser.config, "time_cond_proj_dim", None)
        if width is None:
            return {}
        scale = torch.tensor([params.guidance_scale - 1])
        embedding = self.pipeline.get_guidance_scale_embedding(scale, embedding_dim=width)
        return {"timestep_cond": embedding[0].to(self.device, self.dtype)}

    def _unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents as the VAE takes them."""
        scaled: torch.Tensor = latents / self._vae.config.scaling_factor
        return scaled
