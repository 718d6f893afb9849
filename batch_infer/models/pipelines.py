"""Inspection of diffusers' text-to-image pipelines without a family: which can be called, and with what arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin

from batch_infer.errors import ModelError
from batch_infer.models.card import SamplingRules
from batch_infer.models.components import named_components
from batch_infer.models.families import CHECKER, OTHER
from batch_infer.models.loading import make_pipeline
from batch_infer.models.untrusted import LOADING_ERRORS, LoadingErrors, read_object
from batch_infer.records import SizeRules

REQUIRED = ("prompt", "generator", "height", "width", "num_inference_steps", "num_images_per_prompt", "output_type")
"""Parameters of a text-to-image pipeline's call."""
IMAGE_INPUTS = {"control_image", "mask_image"}
VIDEO_INPUTS = {"num_frames", "video_length"}
GUIDANCE = ("guidance_scale", "true_cfg_scale", "prior_guidance_scale")
"""Parameters for a row's guidance_scale: the first one whose default is a number."""
DENOISERS = ("transformer", "unet", "prior_prior", "prior")
NATIVE_SIDE = 1024
"""Native side in pixels of a pipeline without a default."""


def find_class(name: str) -> Any:
    """Return a pipeline class that makes images from text alone. Raises ModelError."""
    kind: Any = getattr(diffusers, name, None)
    if backends := getattr(kind, "_backends", None):
        needs = [library for library in backends if find_spec(library) is None]
        raise ModelError(f"{name} needs {' and '.join(needs)}: pip install {' '.join(needs)}")
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise ModelError(f"diffusers {diffusers.__version__} has no pipeline {name}; a later one may")
    call = parameters_of(kind)
    if lacking := [argument for argument in REQUIRED if argument not in call]:
        raise ModelError(f"{name} is not text-to-image: its __call__ has no {', '.join(lacking)}")
    if call["output_type"].default != "pil" or VIDEO_INPUTS & call.keys():
        raise ModelError(f"{name} is not text-to-image: its output is not an image")
    if others := sorted(_other_inputs(kind, call)):
        raise ModelError(f"{name} needs more than a text: {', '.join(others)}")
    return kind


def parameters_of(kind: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call."""
    return inspect.signature(kind.__call__).parameters


def _other_inputs(kind: Any, call: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    """Yield the inputs besides text that a pipeline needs."""
    for name, argument in list(call.items())[1:]:
        named = argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
        if name in IMAGE_INPUTS or (named and argument.default is argument.empty and name != "prompt"):
            yield name
    if "image" in call:
        # Only here, because it imports every pipeline of diffusers.
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

        if kind not in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
            yield "image"
    yield from {"controlnet", "adapter"} & inspect.signature(kind.__init__).parameters.keys()


def pipeline_class(path: Path) -> Any:
    """Return the class named by a checkpoint's model_index.json. Raises ModelError."""
    return find_class(_read_index(path)["_class_name"])


def network_classes(path: Path) -> dict[str, Any]:
    """Return the classes of a checkpoint's networks by component, without those that are not read.

    Raises ModelError.
    """
    classes = {}
    for name, (library, kind) in named_components(_read_index(path), path.name).items():
        module: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
        with LoadingErrors(f"{path}: {name} ({kind})"):
            known = getattr(module or getattr(diffusers.pipelines, library), kind, None)
        if name in OTHER.unread | CHECKER:
            continue
        if known is None:
            raise ModelError(f"{path}: {name} is a {kind}, which {library} does not have; a later version may")
        if isinstance(known, type) and (issubclass(known, torch.nn.Module) or hasattr(known, "_model_mapping")):
            classes[name] = known
    return classes


def absent_components(kind: Any, path: Path) -> dict[str, Any]:
    """Return constructor arguments in place of components that are missing or not read.

    Among these is the safety checker, which batch-infer calls itself.
    """
    parameters = inspect.signature(kind.__init__).parameters
    missing = [name for name, value in _read_index(path).items() if isinstance(value, list) and value[:1] == [None]]
    absent = {**dict.fromkeys([*missing, *CHECKER, *OTHER.unread]), "requires_safety_checker": False}
    return {name: value for name, value in absent.items() if name in parameters}


def _read_index(path: Path) -> dict[str, Any]:
    return read_object(path / "model_index.json", path.name)


def inspect_pipeline(path: Path) -> SamplingRules:
    """Return a checkpoint's sampling rules from its pipeline's call and configs, without its weights.

    Raises ModelError.
    """
    kind = pipeline_class(path)
    networks = {name: _without_weights(network, path / name) for name, network in network_classes(path).items()}
    pipeline = make_pipeline(kind, path, {**networks, **absent_components(kind, path)})
    with LoadingErrors(f"{path}: the configs of {kind.__name__}"):
        return _make_rules(kind, pipeline)


def _make_rules(kind: Any, pipeline: Any) -> SamplingRules:
    call, config = parameters_of(kind), denoiser_config(pipeline)
    steps, guidance = call["num_inference_steps"].default, guidance_argument(kind, config)
    uses_negative = "negative_prompt" in call and not ("true_cfg_scale" in call and guidance != "true_cfg_scale")
    fixed = {
        **({} if guidance else {"guidance_scale": 1.0}),
        **({} if uses_negative else {"negative_prompt": None}),
        **({} if "guidance_rescale" in call else {"guidance_rescale": 0.0}),
    }
    return SamplingRules(
        _size_rules(pipeline, config),
        steps if isinstance(steps, int) else 50,
        float(call[guidance].default) if guidance else 1.0,
        embedded_guidance=_is_embedded(config),
        fixed=tuple(fixed.items()),
    )


def find_denoiser(pipeline: Any) -> Any | None:
    """Return the network that a pipeline evaluates at every step."""
    networks = (getattr(pipeline, name, None) for name in DENOISERS)
    return next((network for network in networks if isinstance(network, torch.nn.Module)), None)


def denoiser_config(pipeline: Any) -> Mapping[str, Any]:
    return dict(getattr(find_denoiser(pipeline), "config", {}))


def guidance_argument(kind: Any, denoiser: Mapping[str, Any]) -> str | None:
    """Return the parameter for a row's guidance_scale, None where it would have no effect."""
    call = parameters_of(kind)
    names = [name for name in GUIDANCE if name in call and isinstance(call[name].default, (int, float))]
    if {"guidance_scale", "true_cfg_scale"} <= set(names) and not _is_embedded(denoiser):
        return None  # a distilled Flux: its network has no input for guidance_scale
    return names[0] if names else None


def _is_embedded(denoiser: Mapping[str, Any]) -> bool:
    return bool(denoiser.get("guidance_embeds")) or denoiser.get("time_cond_proj_dim") is not None


def _without_weights(kind: Any, folder: Path) -> Any | None:
    """Return a network on the meta device, which takes no memory; None where it cannot be made there."""
    try:
        with torch.device("meta"):
            if issubclass(kind, ModelMixin):
                return kind.from_config(kind.load_config(folder, local_files_only=True))
            return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    except LOADING_ERRORS:
        return None


def _size_rules(pipeline: Any, denoiser: Mapping[str, Any]) -> SizeRules:
    """Return the default sides of the pipeline's call, and multiples that leave no half patches.

    A pipeline that requires more refuses the row, and its message becomes the row's error.
    """
    names = ("vae_scale_factor", "vae_scale_factor_spatial")
    scale = next((value for name in names if isinstance(value := getattr(pipeline, name, None), int)), None)
    native = getattr(pipeline, "default_sample_size", None) or denoiser.get("sample_size")
    sides = [side * (scale or 1) for side in native] if isinstance(native, (list, tuple)) else []
    if isinstance(native, int):
        sides = [native * (scale or 1)] * 2
    call = parameters_of(type(pipeline))
    defaults = [call[name].default for name in ("height", "width")]
    height, width = defaults if all(isinstance(side, int) for side in defaults) else sides[:2] or [NATIVE_SIDE] * 2
    levels = len(denoiser.get("block_out_channels", ()))
    factor = gcd(height, width, (scale or 8) * (1 if levels else 2))
    return SizeRules(height, width, factor, factor * 2 ** max(0, levels - 1))
