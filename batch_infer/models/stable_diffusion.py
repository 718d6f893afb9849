"""Stable Diffusion 1.x and 2.x checkpoints (Rombach et al., arXiv 2112.10752), epsilon or v-prediction."""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

# Before the import: their advice (which image processor, which flag) is not addressed to the user of a table.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors import SafetensorError
from transformers import CLIPTextModel

from batch_infer.diffusion import Context, Solver
from batch_infer.errors import ModelError, first_line
from batch_infer.models.card import ModelCard, variant_of
from batch_infer.models.family import Conditioning
from batch_infer.models.tokens import TokenCounter
from batch_infer.records import PromptRequest
from batch_infer.settings import SchedulerSpec

# A second and third bar would fight with the run's own.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

MODULES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
LOADING_ERRORS = (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What diffusers and transformers raise for a folder that does not hold what it says."""

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
        modules: dict[str, Any] = {name: _load_module(kind, card, name, dtype) for name, kind in MODULES.items()}
        if with_checker:
            modules["safety_checker"] = _load_module(StableDiffusionSafetyChecker, card, "safety_checker", dtype)
        else:
            modules |= {"safety_checker": None, "requires_safety_checker": False}
        pipeline = _load_pipeline(card, modules)
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
    return Solver(_load_pipeline(card, {**without, "requires_safety_checker": False}).scheduler)


def _load_pipeline(card: ModelCard, modules: Mapping[str, Any]) -> StableDiffusionPipeline:
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(card.path, local_files_only=True, **modules)
    except LOADING_ERRORS as error:
        raise ModelError(f"{card.path} could not be loaded: {first_line(error)}") from error
    if card.scheduler is not None:
        pipeline.scheduler = build_scheduler(card.scheduler, pipeline.scheduler)
    return pipeline


def build_scheduler(spec: SchedulerSpec, own: SchedulerMixin) -> SchedulerMixin:
    """The scheduler of `--scheduler`, on the model's own config. Raises ModelError."""
    found: Any = getattr(diffusers, spec.name, None)
    if needs := getattr(found, "_backends", None) if spec.name.endswith("Scheduler") else None:
        raise ModelError(f"{spec.name} needs {' and '.join(needs)}: pip install {' '.join(needs)}")
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        known = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax"))
        near = [name for name in known if spec.name.lower().removesuffix("scheduler") in name.lower()]
        raise ModelError(f"diffusers has no scheduler {spec.name}; it has {', '.join(near or known)}")
    accepted = inspect.signature(found).parameters
    for key, _ in spec.options:
        if key not in accepted:  # from_config would drop it without a word
            raise ModelError(f"{spec.name} has no option {key}; it has {', '.join(accepted)}")
    try:
        return cast(Any, found).from_config(own.config, **dict(spec.options))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ModelError(f"{spec} cannot be made on this model's scheduler settings: {first_line(error)}") from error


def _load_module(kind: Any, card: ModelCard, name: str, dtype: torch.dtype) -> Any:
    """One network of a checkpoint. Raises ModelError, also for weights that no file holds.

    diffusers and transformers make such weights up without a word: a checker would then flag at random, or never.
    """
    folder = card.path / name
    try:
        module, told = kind.from_pretrained(
            folder, variant=variant_of(folder, card.variant), use_safetensors=True, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    except LOADING_ERRORS as error:
        raise ModelError(f"{folder} could not be loaded: {first_line(error)}") from error
    if missing := sorted(told["missing_keys"]):
        raise ModelError(f"{folder} lacks {len(missing)} of its weights ({missing[0]}, ...); is it complete?")
    # Not by an argument: its name differs between the versions of diffusers and transformers that are supported.
    return module.to(dtype)


def _refuse_variations(config: Mapping[str, Any], card: ModelCard) -> None:
    """UNets of this class that want more than a sample, a timestep and a text."""
    for option in ("time_cond_proj_dim", "class_embed_type", "addition_embed_type", "encoder_hid_dim_type"):
        if (value := config.get(option)) is not None:
            raise ModelError(f"{card.path}: a UNet with {option}={value} is no Stable Diffusion 1.x or 2.x")
    if (channels := config.get("in_channels", 4)) != config.get("out_channels", 4):
        raise ModelError(f"{card.path}: its UNet takes {channels} channels, so it is no text-to-image checkpoint")
