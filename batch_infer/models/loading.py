"""Loading a checkpoint's parts with the libraries that know their formats: networks whole or not at all."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import SchedulerMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors import SafetensorError
from transformers import CLIPImageProcessor

from batch_infer.errors import ModelError, first_line
from batch_infer.models.card import ModelCard
from batch_infer.models.files import variant_of
from batch_infer.settings import SchedulerSpec

# A second and third bar would fight with the run's own.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

LOADING_ERRORS = (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What diffusers and transformers raise for a folder that does not hold what it says."""
COMPUTED = "position_ids"
"""What earlier versions of transformers saved too, though it is no weight: released checkpoints hold it."""


def load_module(kind: Any, card: ModelCard, name: str, dtype: torch.dtype) -> Any:
    """One network of a checkpoint. Raises ModelError, also for weights that no file holds or that no network wants."""
    # Not by an argument: its name differs between the versions of diffusers and transformers that are supported.
    return load_network(kind, card, name).to(dtype)


def load_network(kind: Any, card: ModelCard, name: str, **options: Any) -> Any:
    """One network as its library loads it with these options. Raises ModelError as `load_module` does.

    diffusers and transformers make weights that are not there up without a word: a checker would then flag at random,
    or never.
    """
    folder = card.path / name
    try:
        module, told = kind.from_pretrained(
            folder, variant=variant_of(folder, card.variant), use_safetensors=True, local_files_only=True,
            output_loading_info=True, **options,
        )  # fmt: skip
    except LOADING_ERRORS as error:
        raise ModelError(f"{folder} could not be loaded: {first_line(error)}") from error
    refuse_strange_weights(folder, told["missing_keys"], told["unexpected_keys"])
    return module


def load_checker(card: ModelCard, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A checkpoint's safety checker, and what makes its inputs of images. Raises ModelError."""
    checker = load_module(StableDiffusionSafetyChecker, card, "safety_checker", dtype)
    folder = card.path / "feature_extractor"
    try:
        return checker.to(device), CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except LOADING_ERRORS as error:
        raise ModelError(f"{folder} could not be loaded: {first_line(error)}") from error


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
    try:
        return kind.from_pretrained(path, local_files_only=True, use_safetensors=True, **modules)
    except LOADING_ERRORS as error:
        raise ModelError(f"{path} could not be loaded: {first_line(error)}") from error


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
        made: Any = cast(Any, found).from_config(own.config, **dict(spec.options))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ModelError(f"{spec} cannot be made on this model's scheduler settings: {first_line(error)}") from error
    if _is_flow(made) != _is_flow(own):
        kind = "follow a flow" if _is_flow(own) else "take noise away"
        raise ModelError(f"{spec} does not fit: the model has learnt to {kind}, as its {type(own).__name__} does")
    return cast(SchedulerMixin, made)


def _is_flow(scheduler: Any) -> bool:
    """Whether a sampler follows a flow, which is another thing than taking noise away."""
    config = scheduler.config
    told = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(told) or type(scheduler).__name__.startswith("FlowMatch")
