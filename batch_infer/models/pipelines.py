"""Inspect text-to-image pipelines of diffusers that have no model family, and derive their sampling rules."""

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
from batch_infer.models.families import CHECKER_COMPONENTS, OTHER_FAMILY
from batch_infer.models.loading import make_pipeline
from batch_infer.models.untrusted import LOADING_ERRORS, LoadingErrors, read_object
from batch_infer.records import SizeRules

REQUIRED = ("prompt", "generator", "height", "width", "num_inference_steps", "num_images_per_prompt", "output_type")
"""Parameters that the call of every text-to-image pipeline has."""
IMAGE_INPUTS = {"control_image", "mask_image"}
VIDEO_INPUTS = {"num_frames", "video_length"}
GUIDANCE = ("guidance_scale", "true_cfg_scale", "prior_guidance_scale")
"""Candidates for the parameter that receives a row's guidance_scale: the first one with a numeric default."""
DENOISERS = ("transformer", "unet", "prior_prior", "prior")
NATIVE_SIDE = 1024
"""Native image side in pixels for a pipeline without a default."""


def find_class(name: str) -> Any:
    """Return diffusers' pipeline class `name`. Raises ModelError unless it generates images from text alone."""
    pipeline_type: Any = getattr(diffusers, name, None)
    if backends := getattr(pipeline_type, "_backends", None):
        missing = [library for library in backends if find_spec(library) is None]
        raise ModelError(f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if not (isinstance(pipeline_type, type) and issubclass(pipeline_type, DiffusionPipeline)):
        raise ModelError(f"diffusers {diffusers.__version__} has no pipeline {name}; a later one may")
    call = parameters_of(pipeline_type)
    if absent := [parameter for parameter in REQUIRED if parameter not in call]:
        raise ModelError(f"{name} is not text-to-image: its __call__ has no {', '.join(absent)}")
    if call["output_type"].default != "pil" or VIDEO_INPUTS & call.keys():
        raise ModelError(f"{name} is not text-to-image: its output is not an image")
    if inputs := sorted(_list_other_inputs(pipeline_type, call)):
        raise ModelError(f"{name} needs more than a text: {', '.join(inputs)}")
    return pipeline_type


def parameters_of(pipeline_type: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call."""
    return inspect.signature(pipeline_type.__call__).parameters


def _list_other_inputs(pipeline_type: Any, call: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    """Yield the names of required inputs other than text."""
    for name, parameter in list(call.items())[1:]:
        has_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        is_required = has_name and parameter.default is parameter.empty
        if name in IMAGE_INPUTS or (is_required and name != "prompt"):
            yield name
    if "image" in call:
        # Imported here only, because the module imports every pipeline of diffusers.
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

        if pipeline_type not in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
            yield "image"
    yield from {"controlnet", "adapter"} & inspect.signature(pipeline_type.__init__).parameters.keys()


def pipeline_class(path: Path) -> Any:
    """Return the pipeline class named by a checkpoint's model_index.json. Raises ModelError."""
    return find_class(_read_index(path)["_class_name"])


def network_classes(path: Path) -> dict[str, Any]:
    """Map the component names of the networks to load to their classes. Raises ModelError."""
    classes = {}
    for name, (library, class_name) in named_components(_read_index(path), path.name).items():
        module: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
        with LoadingErrors(f"{path}: {name} ({class_name})"):
            network_type = getattr(module or getattr(diffusers.pipelines, library), class_name, None)
        if name in OTHER_FAMILY.skipped_components | CHECKER_COMPONENTS:
            continue
        if network_type is None:
            raise ModelError(f"{path}: {name} is a {class_name}, which {library} does not have; a later version may")
        if isinstance(network_type, type) and (
            issubclass(network_type, torch.nn.Module) or hasattr(network_type, "_model_mapping")
        ):
            classes[name] = network_type
    return classes


def absent_components(pipeline_type: Any, path: Path) -> dict[str, Any]:
    """Return constructor arguments that replace components that are missing or not loaded.

    These include the safety checker, which batch-infer loads and calls separately.
    """
    parameters = inspect.signature(pipeline_type.__init__).parameters
    missing = [name for name, value in _read_index(path).items() if isinstance(value, list) and value[:1] == [None]]
    absent = {
        **dict.fromkeys([*missing, *CHECKER_COMPONENTS, *OTHER_FAMILY.skipped_components]),
        "requires_safety_checker": False,
    }
    return {name: value for name, value in absent.items() if name in parameters}


def _read_index(path: Path) -> dict[str, Any]:
    return read_object(path / "model_index.json", path.name)


def inspect_pipeline(path: Path) -> SamplingRules:
    """Derive a checkpoint's sampling rules from its pipeline class and configs, without weights. Raises ModelError."""
    pipeline_type = pipeline_class(path)
    networks = {name: _without_weights(network, path / name) for name, network in network_classes(path).items()}
    pipeline = make_pipeline(pipeline_type, path, {**networks, **absent_components(pipeline_type, path)})
    with LoadingErrors(f"{path}: the configs of {pipeline_type.__name__}"):
        return _make_rules(pipeline_type, pipeline)


def _make_rules(pipeline_type: Any, pipeline: Any) -> SamplingRules:
    call, config = parameters_of(pipeline_type), denoiser_config(pipeline)
    steps, guidance = call["num_inference_steps"].default, guidance_argument(pipeline_type, config)
    uses_negative = "negative_prompt" in call and not ("true_cfg_scale" in call and guidance != "true_cfg_scale")
    unsupported: dict[str, Any] = {}
    if guidance is None:
        unsupported["guidance_scale"] = 1.0
    if not uses_negative:
        unsupported["negative_prompt"] = None
    if "guidance_rescale" not in call:
        unsupported["guidance_rescale"] = 0.0
    return SamplingRules(
        _size_rules(pipeline, config),
        steps if isinstance(steps, int) else 50,
        float(call[guidance].default) if guidance else 1.0,
        embedded_guidance=_is_embedded(config),
        unsupported_fields=tuple(unsupported.items()),
    )


def find_denoiser(pipeline: Any) -> Any | None:
    """Return the network that a pipeline evaluates at every step, None if it cannot be identified."""
    networks = (getattr(pipeline, name, None) for name in DENOISERS)
    return next((network for network in networks if isinstance(network, torch.nn.Module)), None)


def denoiser_config(pipeline: Any) -> Mapping[str, Any]:
    return dict(getattr(find_denoiser(pipeline), "config", {}))


def guidance_argument(pipeline_type: Any, denoiser: Mapping[str, Any]) -> str | None:
    """Return the name of the parameter for a row's guidance_scale, None if the scale would have no effect."""
    call = parameters_of(pipeline_type)
    names = [name for name in GUIDANCE if name in call and isinstance(call[name].default, (int, float))]
    if {"guidance_scale", "true_cfg_scale"} <= set(names) and not _is_embedded(denoiser):
        return None  # a distilled Flux, whose network has no input for guidance_scale
    return names[0] if names else None


def _is_embedded(denoiser: Mapping[str, Any]) -> bool:
    return bool(denoiser.get("guidance_embeds")) or denoiser.get("time_cond_proj_dim") is not None


def _without_weights(network_type: Any, folder: Path) -> Any | None:
    """Build a network on the meta device, which needs no memory. Returns None if that fails."""
    try:
        with torch.device("meta"):
            if issubclass(network_type, ModelMixin):
                return network_type.from_config(network_type.load_config(folder, local_files_only=True))
            return network_type(network_type.config_class.from_pretrained(folder, local_files_only=True))
    except LOADING_ERRORS:
        return None


def _size_rules(pipeline: Any, denoiser: Mapping[str, Any]) -> SizeRules:
    """Return the pipeline's default image sides, and side multiples that fit whole patches, in pixels.

    A pipeline with stricter rules refuses the row, and the pipeline's message becomes the row's error.
    """
    scales = (getattr(pipeline, name, None) for name in ("vae_scale_factor", "vae_scale_factor_spatial"))
    scale = next((value for value in scales if isinstance(value, int)), None)
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
