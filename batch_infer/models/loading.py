"""Loading of networks, safety checkers and diffusers pipelines from a checkpoint: complete or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessor

from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.schedulers import build_scheduler
from batch_infer.models.tokens import limit_tokenizer
from batch_infer.models.untrusted import LoadingErrors, variant_of

# Their progress bars would interleave with the run's own.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

COMPUTED = "position_ids"
"""End of the names of buffers that earlier versions of transformers saved: released checkpoints hold them."""


def load_module(kind: Any, card: ModelCard, name: str, dtype: torch.dtype) -> Any:
    """Load a component of this class in a dtype. Raises ModelError, also for missing and unexpected weights."""
    # Not by an argument: its name differs between the supported versions of diffusers and transformers.
    network = load_network(kind, card, name)
    with LoadingErrors(card.path / name):  # quantized weights may refuse another dtype
        return network.to(dtype)


def load_network(kind: Any, card: ModelCard, name: str, **options: Any) -> Any:
    """Load a component with these options of its library. Raises ModelError as `load_module` does.

    diffusers and transformers initialize missing weights at random and say nothing: a checker would then flag at
    random, or never.
    """
    folder = card.path / name
    with LoadingErrors(folder):
        module, info = kind.from_pretrained(
            folder, variant=variant_of(folder, card.variant), use_safetensors=True, local_files_only=True,
            output_loading_info=True, **options,
        )  # fmt: skip
    refuse_unmatched_weights(folder, info["missing_keys"], info["unexpected_keys"])
    return module


def refuse_unmatched_weights(place: object, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ModelError where a checkpoint's tensors are not exactly those of the network."""
    strange = [key for key in unexpected if not key.endswith(COMPUTED)]
    for keys, verb in ((sorted(missing), "lacks"), (sorted(strange), "holds, besides its network's,")):
        if keys:
            names = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            tensors = "1 tensor" if len(keys) == 1 else f"{len(keys)} tensors"
            raise ModelError(f"{place} {verb} {tensors} ({names}); is the checkpoint complete and of this class?")


def load_checker(card: ModelCard, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a checkpoint's safety checker and its image processor. Raises ModelError."""
    checker = load_module(StableDiffusionSafetyChecker, card, "safety_checker", dtype)
    folder = card.path / "feature_extractor"
    with LoadingErrors(folder):
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        pixels = processor([Image.new("RGB", (64, 64))], return_tensors="pt").pixel_values
    side = checker.config.vision_config.image_size
    if pixels.shape != (1, 3, side, side) or not pixels.isfinite().all():
        raise ModelError(
            f"{folder}/preprocessor_config.json makes images of shape {list(pixels.shape[1:])}, and the safety checker "
            f"takes finite ones of {[3, side, side]} (crop_size, size, image_mean, image_std)"
        )
    return checker.to(device), processor


def load_pipeline(kind: Any, card: ModelCard, modules: Mapping[str, Any]) -> Any:
    """Make a diffusers pipeline around loaded components, with the requested scheduler. Raises ModelError."""
    pipeline = make_pipeline(kind, card.path, modules)
    if card.scheduler is not None:
        pipeline.scheduler = build_scheduler(card.scheduler, pipeline.scheduler)
    return pipeline


def make_pipeline(kind: Any, path: Path, modules: Mapping[str, Any]) -> Any:
    """Make a diffusers pipeline around loaded components; diffusers reads the others. Raises ModelError."""
    with LoadingErrors(path):
        pipeline = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, **modules)
    for suffix in ("", "_2", "_3"):
        _limit_tokenizer(pipeline, path, suffix)
    return pipeline


def _limit_tokenizer(pipeline: Any, path: Path, suffix: str) -> None:
    """Give a tokenizer its text encoder's limit, which pipelines too take from the tokenizer. Raises ModelError."""
    tokenizer: Any = getattr(pipeline, f"tokenizer{suffix}", None)
    encoder: Any = getattr(pipeline, f"text_encoder{suffix}", None)
    if not hasattr(tokenizer, "model_max_length") or encoder is None:
        return
    folder = path / f"tokenizer{suffix}"
    with LoadingErrors(folder):
        table = encoder.get_input_embeddings() if hasattr(encoder, "get_input_embeddings") else None
        positions = getattr(encoder.config, "max_position_embeddings", None)
        limit_tokenizer(tokenizer, positions, getattr(table, "num_embeddings", None), folder)
    if not suffix and isinstance(getattr(pipeline, "tokenizer_max_length", None), (int, float)):
        pipeline.tokenizer_max_length = min(pipeline.tokenizer_max_length, tokenizer.model_max_length)
