"""Loading a checkpoint's parts with the libraries that know their formats: networks whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import SchedulerMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessor

from batch_infer.diffusion import Solver
from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.files import variant_of
from batch_infer.models.schedulers import refuse_unknown_scheduler
from batch_infer.models.tokens import fit_tokenizer
from batch_infer.models.untrusted import LOADING_ERRORS, LoadingErrors, describe
from batch_infer.settings import SchedulerSpec

# A second and third bar would fight with the run's own.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

COMPUTED = "position_ids"
"""What earlier versions of transformers saved too, though it is no weight: released checkpoints hold it."""


def load_module(kind: Any, card: ModelCard, name: str, dtype: torch.dtype) -> Any:
    """One network of a checkpoint. Raises ModelError, also for weights that no file holds or that no network wants."""
    # Not by an argument: its name differs between the versions of diffusers and transformers that are supported.
    network = load_network(kind, card, name)
    with LoadingErrors(card.path / name):  # quantized weights may refuse another dtype
        return network.to(dtype)


def load_network(kind: Any, card: ModelCard, name: str, **options: Any) -> Any:
    """One network as its library loads it with these options. Raises ModelError as `load_module` does.

    diffusers and transformers make weights that are not there up without a word: a checker would then flag at random,
    or never.
    """
    folder = card.path / name
    with LoadingErrors(folder):
        module, told = kind.from_pretrained(
            folder, variant=variant_of(folder, card.variant), use_safetensors=True, local_files_only=True,
            output_loading_info=True, **options,
        )  # fmt: skip
    refuse_strange_weights(folder, told["missing_keys"], told["unexpected_keys"])
    return module


def load_checker(card: ModelCard, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A checkpoint's safety checker, and what makes its inputs of images. Raises ModelError."""
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


def refuse_strange_weights(place: object, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ModelError where a checkpoint and its network do not hold the same tensors."""
    strange = [key for key in unexpected if not key.endswith(COMPUTED)]
    for found, told in ((sorted(missing), "lacks"), (sorted(strange), "holds, beside its network's,")):
        if found:
            names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            tensors = "1 tensor" if len(found) == 1 else f"{len(found)} tensors"
            raise ModelError(f"{place} {told} {tensors} ({names}); is it the checkpoint that it says, and complete?")


def load_pipeline(kind: Any, card: ModelCard, modules: Mapping[str, Any]) -> Any:
    """A diffusers pipeline around loaded networks, with the scheduler that was asked for. Raises ModelError."""
    pipeline = make_pipeline(kind, card.path, modules)
    if card.scheduler is not None:
        pipeline.scheduler = build_scheduler(card.scheduler, pipeline.scheduler)
    return pipeline


def make_pipeline(kind: Any, path: Path, modules: Mapping[str, Any]) -> Any:
    """A diffusers pipeline around loaded networks; diffusers reads the rest from the folder. Raises ModelError."""
    with LoadingErrors(path):
        pipeline = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, **modules)
    _fit_tokenizers(pipeline, path)
    return pipeline


def make_solver(pipeline: Any, begin_index: int | None = None) -> Solver:
    """Make a solver of a pipeline's scheduler; `begin_index` as Solver has it. Raises ModelError."""
    with LoadingErrors(f"{type(pipeline.scheduler).__name__} with scheduler/scheduler_config.json"):
        return Solver(pipeline.scheduler, begin_index)


def _fit_tokenizers(pipeline: Any, path: Path) -> None:
    """Give each tokenizer its text encoder's limit, which pipelines too take from the tokenizer. Raises ModelError."""
    for suffix in ("", "_2", "_3"):
        tokenizer: Any = getattr(pipeline, f"tokenizer{suffix}", None)
        encoder: Any = getattr(pipeline, f"text_encoder{suffix}", None)
        if not hasattr(tokenizer, "model_max_length") or encoder is None:
            continue
        folder = path / f"tokenizer{suffix}"
        with LoadingErrors(folder):
            table = encoder.get_input_embeddings() if hasattr(encoder, "get_input_embeddings") else None
            positions = getattr(encoder.config, "max_position_embeddings", None)
            fit_tokenizer(tokenizer, positions, getattr(table, "num_embeddings", None), folder)
        if not suffix and isinstance(getattr(pipeline, "tokenizer_max_length", None), (int, float)):
            pipeline.tokenizer_max_length = min(pipeline.tokenizer_max_length, tokenizer.model_max_length)


def build_scheduler(spec: SchedulerSpec, own: SchedulerMixin) -> SchedulerMixin:
    """The scheduler of `--scheduler`, on the model's own config. Raises ModelError."""
    refuse_unknown_scheduler(spec)
    found: Any = getattr(diffusers, spec.name, None)
    if needs := getattr(found, "_backends", None):
        raise ModelError(f"{spec.name} needs {' and '.join(needs)}: pip install {' '.join(needs)}")
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ModelError(f"diffusers keeps its scheduler {spec.name} for one of its own pipelines; choose another")
    try:
        made: Any = cast(Any, found).from_config(own.config, **dict(spec.options))
    except LOADING_ERRORS as error:
        raise ModelError(f"{spec} cannot be made on this model's scheduler settings: {describe(error)}") from error
    if _is_flow(made) != _is_flow(own):
        kind = "follow a flow" if _is_flow(own) else "take noise away"
        raise ModelError(f"{spec} does not fit: the model has learnt to {kind}, as its {type(own).__name__} does")
    return cast(SchedulerMixin, made)


def _is_flow(scheduler: Any) -> bool:
    """Whether a sampler follows a flow, which is another thing than taking noise away."""
    config = scheduler.config
    told = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(told) or type(scheduler).__name__.startswith("FlowMatch")
