"""Load and run checkpoints with step-level batching, and cache prompt embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch

from batch_infer.diffusion import Context, Solver
from batch_infer.models.card import ModelCard
from batch_infer.models.families import FAMILIES
from batch_infer.models.loading import RowLoraSwitch, add_embeddings, fuse_loras, load_checker, load_pipeline
from batch_infer.models.offloading import offload_networks
from batch_infer.models.quantization import quantize
from batch_infer.models.schedulers import make_solver
from batch_infer.models.textual_inversion import Embedding, expand_tokens
from batch_infer.models.tokens import TokenCounter
from batch_infer.records import PromptRequest, SamplingParams
from batch_infer.settings import Offload
from batch_infer.stacking import EncoderCache

TEXT_BATCH = 8
"""Number of texts, after padding, that the encoder gets together. Other numbers change embeddings by about 1e-8."""
CACHE_BYTES = 128 << 20
"""Maximum bytes of cached embeddings on the device: about 1,100 texts of SD 1.5 or 49 of SD 3.5 in half precision."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A row's token count and its denoiser inputs other than the sample and timestep.

    `context` is the conditional context and, with guidance, the unconditional one. `prompt_tokens` excludes start, end
    and padding tokens. `prompt_truncated` is True if a text encoder drops tokens. Unknown values are None.
    """

    context: tuple[Context, Context | None]
    prompt_tokens: int | None
    prompt_truncated: bool | None


class EmbeddingCache:
    """Caches the most recently used embeddings for rows with equal prompts or negative prompts."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._cache = EncoderCache(max_bytes)

    def get(self, texts: Iterable[str], encode: Callable[[Sequence[str]], Iterable[Context]]) -> Mapping[str, Context]:
        """Map texts to their embeddings. `encode` gets the texts not cached, padded to TEXT_BATCH per call."""
        requested = set(texts)
        embeddings: dict[str, Context] = {
            text: context for text in requested if (context := self._cache.get(text)) is not None
        }
        missing = sorted(requested - embeddings.keys())
        for start in range(0, len(missing), TEXT_BATCH):
            batch = missing[start : start + TEXT_BATCH]
            padding = [""] * (TEXT_BATCH - len(batch))
            for text, context in zip(batch, encode(batch + padding), strict=False):
                # A view would retain the memory of the whole batch.
                embeddings[text] = {name: part.clone() for name, part in context.items()}
                self._cache.put(text, embeddings[text])
        return embeddings


class LatentDiffusion(RowLoraSwitch):
    """A loaded checkpoint. Batches are padded to fixed shapes, so that a row does not depend on other rows.

    Subclasses implement `load_modules` and `_encode`, and override methods for a different denoiser or VAE.
    """

    uses_pipeline_call: ClassVar[bool] = False
    min_slots: ClassVar[int] = 2
    """Smallest batch size of a denoiser call. A row with guidance has two elements in a call."""
    absent_components: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the pipeline's constructor for components that are not loaded."""
    begin_index: ClassVar[int | None] = None
    """The begin index that diffusers' pipeline sets in the scheduler, or None if the scheduler searches for it."""

    def __init__(
        self, pipeline: Any, denoiser: Any, device: torch.device, dtype: torch.dtype, windows: int = 1
    ) -> None:
        """`pipeline` contains all components except a `denoiser` whose class diffusers does not know."""
        self.pipeline, self.denoiser, self.device, self.dtype = pipeline, denoiser, device, dtype
        self.solver = make_solver(pipeline.scheduler, self.begin_index)
        self.safety_checker: Any | None = getattr(pipeline, "safety_checker", None)
        self.feature_extractor: Any | None = getattr(pipeline, "feature_extractor", None)
        self._vae = pipeline.vae
        # tokenizer_3 is excluded, because T5 also reads the text that the CLIP encoders truncate.
        tokenizers = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        self._counter: Any = TokenCounter(*filter(None, tokenizers))
        self._encoder: Callable[[Sequence[str]], list[Context]] | None = None
        self._windows = windows
        self._embedding_tokens: Sequence[Embedding] = ()
        self.clear_embeddings()

    @classmethod
    def load(
        cls, card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool, on_host: bool = False
    ) -> LatentDiffusion:
        """Load a checkpoint and optionally its safety checker. Raises ModelError.

        With `on_host`, the networks stay in host memory until `offload` is called.
        """
        denoiser, modules = cls.load_modules(card, dtype)
        modules = {**cls.absent_components, **modules}
        if with_checker:
            modules["safety_checker"], modules["feature_extractor"] = load_checker(card, device, dtype)
        pipeline = load_pipeline(_pipeline_class(card), card.path, modules, card.scheduler)
        add_embeddings(pipeline, card)
        fuse_loras(pipeline, card)
        if card.quantize is not None:
            quantize({**pipeline.components, "denoiser": denoiser}, card.quantize, card.name)
        if not on_host:
            pipeline.to(device)
            denoiser.to(device)
        model = cls(pipeline, denoiser, device, dtype, card.windows)
        model._use_embeddings(card.embeddings)
        return model

    def offload(self, mode: Offload) -> None:
        """Move the networks to the device only when they run."""
        networks = (*self.pipeline.components.values(), self.denoiser, self._vae)
        offload_networks(networks, self.device, mode, self.safety_checker)

    @classmethod
    def load_solver(cls, card: ModelCard) -> Solver:
        """Load the same solver as with the full pipeline, but without networks. Raises ModelError."""
        pipeline_type = _pipeline_class(card)
        parameters = inspect.signature(pipeline_type).parameters
        required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
        absent = {name: None for name in required if name != "scheduler"}
        pipeline = load_pipeline(pipeline_type, card.path, {**absent, **cls.absent_components}, card.scheduler)
        return make_solver(pipeline.scheduler, cls.begin_index)

    @classmethod
    def load_modules(cls, card: ModelCard, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """Load the denoiser, and the pipeline's components as a dictionary by name. Raises ModelError."""
        raise NotImplementedError

    def _use_embeddings(self, embeddings: Sequence[Embedding]) -> None:
        """Replace the tokens of textual inversion embeddings in texts by one token for each vector."""
        if embeddings:
            self._embedding_tokens = embeddings
            tokenizers = (getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
            self._counter = TokenCounter(*filter(None, tokenizers), embeddings=embeddings)

    def clear_embeddings(self) -> None:
        self._embeddings = EmbeddingCache()
        if self._windows > 1:
            from batch_infer.models.long_prompts import LongPrompts

            self._counter = self._encoder = LongPrompts(self.pipeline, self.dtype)

    @property
    def networks(self) -> Sequence[torch.nn.Module]:
        """Networks with one fixed input shape per image size, which can be compiled."""
        return self.denoiser, self._vae.decoder

    def count_rows(self, slots: int, params: SamplingParams) -> int:
        """Return how many rows with these parameters are denoised at a time."""
        return slots // params.slots

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the latent shape (C, h, w) of an image of `height` by `width` pixels."""
        factor = self.pipeline.vae_scale_factor
        return self.denoiser.config.in_channels, height // factor, width // factor

    @torch.inference_mode()
    def condition(self, requests: Sequence[PromptRequest]) -> list[Conditioning]:
        """Encode the prompts of rows and count their tokens."""
        negatives = [self._negative_prompt(request) if request.params.uses_guidance else None for request in requests]
        texts = {request.prompt for request in requests} | {text for text in negatives if text is not None}
        embeddings = self._embeddings.get(texts, self._encoder or self._encode_expanded)
        counts = self._counter.count([request.prompt for request in requests])
        conditionings = []
        for request, text, count in zip(requests, negatives, counts, strict=True):
            prompt, extra = embeddings[request.prompt], self._make_inputs(request.params)
            unconditional: Context | None = None
            if text is not None:
                unconditional = {**embeddings[text], **extra}
            elif request.params.uses_guidance:
                unconditional = {**{name: torch.zeros_like(part) for name, part in prompt.items()}, **extra}
            truncated = count > self._counter.max_tokens
            conditionings.append(Conditioning(({**prompt, **extra}, unconditional), count, truncated))
        return conditionings

    @torch.inference_mode()
    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        """Evaluate the denoiser for all slots at once: sample (N, C, h, w), timestep (N,), context tensors (N, ...)."""
        output: torch.Tensor = self.denoiser(sample, timestep=timestep, **context, return_dict=False)[0]
        return output

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, C, h, w) to float32 images (B, 3, H, W), not clamped: 0 is black and 1 is white."""
        images: torch.Tensor = self._vae.decode(self._unscale(latents.to(self._vae.dtype)), return_dict=False)[0]
        return images.float() / 2 + 0.5

    def _encode_expanded(self, texts: Sequence[str]) -> list[Context]:
        return self._encode(expand_tokens(texts, self._embedding_tokens))

    def _encode(self, texts: Sequence[str]) -> list[Context]:
        """Return the embeddings of each text."""
        raise NotImplementedError

    def _negative_prompt(self, request: PromptRequest) -> str | None:
        """Return the text for the unconditional context of a row with guidance, or None if the context is all zeros."""
        return request.negative_prompt or ""

    def _make_inputs(self, params: SamplingParams) -> Context:
        """Return a row's inputs other than texts: the embedded guidance scale (Meng et al., arXiv 2210.03142), if any.

        The UNet gets guidance_scale - 1: without guidance, the scale is 1 in diffusers but 0 in these UNets.
        """
        width = getattr(self.denoiser.config, "time_cond_proj_dim", None)
        if width is None:
            return {}
        scale = torch.tensor([params.guidance_scale - 1])
        embedding = self.pipeline.get_guidance_scale_embedding(scale, embedding_dim=width)
        return {"timestep_cond": embedding[0].to(self.device, self.dtype)}

    def _unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """Rescale latents for the VAE's decoder."""
        scaled: torch.Tensor = latents / self._vae.config.scaling_factor
        return scaled


def _pipeline_class(card: ModelCard) -> Any:
    return getattr(diffusers, FAMILIES[card.pipeline].pipeline_class or card.pipeline)
