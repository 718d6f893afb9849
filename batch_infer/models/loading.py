"""Load networks, safety checkers and diffusers pipelines, and refuse incomplete weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessor

from batch_infer.accelerator import out_of_memory_errors
from batch_infer.errors import FailedRowError, ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.schedulers import build_scheduler
from batch_infer.models.tokens import limit_tokenizer
from batch_infer.models.untrusted import choose_variant, loading_errors
from batch_infer.records import Lora
from batch_infer.settings import SchedulerSpec

if TYPE_CHECKING:
    from batch_infer.models.lora_fusing import RowLoras

# These progress bars would disturb those of batch-infer.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

COMPUTED_SUFFIX = "position_ids"
"""Suffix of the names of buffers that earlier versions of transformers saved in checkpoints."""


def load_components(classes: Mapping[str, Any], card: ModelCard, dtype: torch.dtype) -> dict[str, Any]:
    """Load components of the given classes in a dtype. Raises ModelError, also for missing and unexpected weights."""
    components = {}
    for name, component_type in classes.items():
        # The dtype is not an argument: its name differs between the supported versions of diffusers and transformers.
        component = load_network(component_type, card, name)
        with loading_errors(card.path / name):  # quantized weights may refuse the conversion
            components[name] = component.to(dtype)
    return components


def load_network(component_type: Any, card: ModelCard, name: str, **options: Any) -> Any:
    """Load a component with options of its library. Raises ModelError, also for missing and unexpected weights.

    diffusers and transformers silently initialize missing weights at random. A safety checker would then flag images
    at random, or none.
    """
    folder = card.path / name
    with loading_errors(folder):
        module, info = component_type.from_pretrained(
            folder, variant=choose_variant(folder.glob("*"), card.variant), use_safetensors=True, local_files_only=True,
            output_loading_info=True, **options,
        )  # fmt: skip
    refuse_unmatched_weights(folder, info["missing_keys"], info["unexpected_keys"])
    return module


def refuse_unmatched_weights(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ModelError if tensors are missing or unexpected. Unexpected computed buffers are ignored."""
    unexpected = [key for key in unexpected if not key.endswith(COMPUTED_SUFFIX)]
    for keys, verb, adjective in ((sorted(missing), "lacks", ""), (sorted(unexpected), "has", "unexpected ")):
        if keys:
            names = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            count = f"{len(keys)} {adjective}tensor{'s' if len(keys) > 1 else ''}"
            raise ModelError(f"{folder} {verb} {count} ({names}); is the checkpoint complete and of this class?")


def load_checker(card: ModelCard, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a checkpoint's safety checker and its image processor. Raises ModelError."""
    checker = load_components({"safety_checker": StableDiffusionSafetyChecker}, card, dtype)["safety_checker"]
    folder = card.path / "feature_extractor"
    with loading_errors(folder):
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        pixels = processor([Image.new("RGB", (64, 64))], return_tensors="pt").pixel_values
    side = checker.config.vision_config.image_size
    if pixels.shape != (1, 3, side, side) or not pixels.isfinite().all():
        raise ModelError(
            f"{folder}/preprocessor_config.json makes images of shape {list(pixels.shape[1:])}, but the safety checker "
            f"takes finite images of shape {[3, side, side]} (crop_size, size, image_mean, image_std)"
        )
    return checker.to(device), processor


def load_pipeline(
    pipeline_type: Any, path: Path, modules: Mapping[str, Any], scheduler: SchedulerSpec | None = None
) -> Any:
    """Build a diffusers pipeline from loaded components and, if requested, another scheduler. Raises ModelError.

    diffusers itself loads the components that are not in `modules`. Each tokenizer's
    maximum length is limited to that of its text encoder.
    """
    with loading_errors(path):
        pipeline = pipeline_type.from_pretrained(path, local_files_only=True, use_safetensors=True, **modules)
    if scheduler is not None:
        pipeline.scheduler = build_scheduler(scheduler, pipeline.scheduler)
    for suffix in ("", "_2", "_3"):
        _limit_tokenizer(pipeline, path, suffix)
    return pipeline


def _limit_tokenizer(pipeline: Any, path: Path, suffix: str) -> None:
    """Limit a tokenizer's maximum length, which pipelines use, to that of its text encoder. Raises ModelError."""
    tokenizer: Any = getattr(pipeline, f"tokenizer{suffix}", None)
    encoder: Any = getattr(pipeline, f"text_encoder{suffix}", None)
    if not hasattr(tokenizer, "model_max_length") or encoder is None:
        return
    folder = path / f"tokenizer{suffix}"
    with loading_errors(folder):
        embeddings = encoder.get_input_embeddings() if hasattr(encoder, "get_input_embeddings") else None
        positions = getattr(encoder.config, "max_position_embeddings", None)
        limit_tokenizer(tokenizer, positions, getattr(embeddings, "num_embeddings", None), folder)
    if not suffix and isinstance(getattr(pipeline, "tokenizer_max_length", None), (int, float)):
        pipeline.tokenizer_max_length = min(pipeline.tokenizer_max_length, tokenizer.model_max_length)


def disable_sampling(pipeline: Any) -> None:
    """Let text encoders that a pipeline uses to rewrite prompts choose the most likely words.

    Otherwise they draw from the global generator, which does not depend on the row's seed.
    """
    for part in pipeline.components.values():
        if (config := getattr(part, "generation_config", None)) is not None:
            config.update(do_sample=False, temperature=None, top_p=None, top_k=None)


def add_embeddings(pipeline: Any, card: ModelCard) -> None:
    """Load the embeddings of --embedding into a pipeline. Raises ModelError if one does not fit."""
    if card.embeddings:
        from batch_infer.models.embedding_loading import load_embeddings

        load_embeddings(pipeline, card)


def fuse_loras(pipeline: Any, card: ModelCard) -> None:
    """Fuse the LoRAs of --lora into the weights of a pipeline. Raises ModelError if one does not fit."""
    if card.loras:
        from batch_infer.models.lora_fusing import fuse_lora  # imports peft

        for lora in card.loras:
            fuse_lora(pipeline, lora, card.name)


class RowLoraSwitch:
    """A model whose weights can have the LoRA of the current rows."""

    pipeline: Any
    device: torch.device
    _row_loras: RowLoras | None = None

    def use_lora(self, lora: Lora | None) -> None:
        """Add a LoRA to the weights for the next rows, or remove it with None. Does nothing if the weights match.

        Raises RowError if it does not fit, and FailedRowError if its file was changed or memory is too small for it.
        """
        if self._row_loras is None:
            if lora is None:
                return
            from batch_infer.models.lora_fusing import RowLoras  # imports peft

            self._row_loras = RowLoras(self.pipeline, self.device)
        if self._row_loras.is_in_use(lora):
            return
        try:
            with out_of_memory_errors():
                self._row_loras.use(lora)
        except torch.OutOfMemoryError as error:
            change = "to remove the last LoRA" if lora is None else f"to add {lora}"
            raise FailedRowError(f"the device's memory is too small {change}") from error
        finally:
            self.clear_embeddings()

    def clear_embeddings(self) -> None:
        """Encode all prompts again from now on, for example with other weights."""
        raise NotImplementedError
