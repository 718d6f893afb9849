"""Find diffusers' text-to-image pipeline classes, build pipelines, and derive their sampling rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import TextualInversionLoaderMixin

from batch_infer.errors import ModelError
from batch_infer.models.card import SamplingRules
from batch_infer.models.components import named_components
from batch_infer.models.families import CHECKER_COMPONENTS, OTHER_FAMILY
from batch_infer.models.loading import load_pipeline
from batch_infer.models.untrusted import LOADING_ERRORS, loading_errors, read_object
from batch_infer.records import SizeRules

REQUIRED = ("prompt", "generator", "height", "width", "num_inference_steps", "num_images_per_prompt", "output_type")
"""Parameters that a text-to-image pipeline's `__call__` must have."""
IMAGE_INPUTS = {"control_image", "mask_image"}
VIDEO_INPUTS = {"num_frames", "video_length"}
GUIDANCE = ("guidance_scale", "true_cfg_scale", "prior_guidance_scale")
"""Candidates for the parameter that receives a row's guidance_scale. `find_guidance_argument` chooses one."""
DENOISERS = ("transformer", "unet", "prior_prior", "prior")
"""Components that may be the denoiser. The first that is a network is used."""
NATIVE_SIDE = 1024
"""Default image side in pixels for a pipeline that defines none."""


def find_class(name: str) -> Any:
    """Return diffusers' pipeline class `name`. Raises ModelError if it is unavailable or not text-to-image."""
    pipeline_type: Any = getattr(diffusers, name, None)
    _refuse_missing_libraries(pipeline_type, name)
    if not (isinstance(pipeline_type, type) and issubclass(pipeline_type, DiffusionPipeline)):
        raise ModelError(f"diffusers {diffusers.__version__} has no pipeline {name}; a later version may have it")
    call = parameters_of(pipeline_type)
    if absent := [parameter for parameter in REQUIRED if parameter not in call]:
        raise ModelError(f"{name} is not text-to-image: its __call__ has no {', '.join(absent)}")
    if call["output_type"].default != "pil" or VIDEO_INPUTS & call.keys():
        raise ModelError(f"{name} is not text-to-image: its output is not an image")
    if inputs := sorted(_list_other_inputs(pipeline_type, call)):
        raise ModelError(f"{name} needs inputs other than text: {', '.join(inputs)}")
    return pipeline_type


def _refuse_missing_libraries(component_type: Any, name: str) -> None:
    """Raise ModelError for the placeholder that diffusers or transformers have for a class without its libraries."""
    if backends := getattr(component_type, "_backends", None):
        missing = [library for library in backends if find_spec(library) is None] or backends
        raise ModelError(f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def parameters_of(pipeline_type: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline_type.__call__).parameters


def _list_other_inputs(pipeline_type: Any, call: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    """Yield inputs other than text that are required or, like `mask_image`, mark a pipeline that needs an image."""
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


def build_pipeline(path: Path, load: Callable[[Any, str], Any]) -> Any:
    """Build a checkpoint's pipeline from the networks that `load` returns for a class and name. Raises ModelError.

    The pipeline gets no safety checker, because batch-infer loads and calls it separately.
    """
    index = read_object(path / "model_index.json", path.name)
    pipeline_type = find_class(index["_class_name"])
    skipped = OTHER_FAMILY.skipped_components | CHECKER_COMPONENTS
    missing = [name for name, value in index.items() if isinstance(value, list) and value[:1] == [None]]
    absent = {**dict.fromkeys([*missing, *skipped]), "requires_safety_checker": False}
    parameters = inspect.signature(pipeline_type.__init__).parameters
    modules = {name: value for name, value in absent.items() if name in parameters}
    for name, (library, class_name) in named_components(index, path.name).items():
        if name in skipped:
            continue
        module: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
        with loading_errors(f"{path}: {name} ({class_name})"):
            component_type = getattr(module or getattr(diffusers.pipelines, library), class_name, None)
        if component_type is None:
            raise ModelError(f"{path}: {name} is a {class_name}, which this version of {library} does not have")
        _refuse_missing_libraries(component_type, f"{path}: {name} ({class_name})")
        is_network = isinstance(component_type, type) and issubclass(component_type, torch.nn.Module)
        if is_network or hasattr(component_type, "_model_mapping"):
            modules[name] = load(component_type, name)
    return load_pipeline(pipeline_type, path, modules)


def inspect_pipeline(path: Path) -> SamplingRules:
    """Derive a checkpoint's sampling rules from its pipeline class and configs, without weights. Raises ModelError."""
    pipeline = build_without_weights(path)
    with loading_errors(f"{path}: the configs of {type(pipeline).__name__}"):
        return make_rules(pipeline)


def make_rules(pipeline: Any) -> SamplingRules:
    """Derive sampling rules from a pipeline's class and the configs of its networks."""
    call, config = parameters_of(type(pipeline)), _denoiser_config(pipeline)
    steps, guidance = call["num_inference_steps"].default, find_guidance_argument(pipeline)
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
        supports_lora=hasattr(pipeline, "load_lora_weights"),
        supports_embeddings=isinstance(pipeline, TextualInversionLoaderMixin),
    )


def find_denoiser(pipeline: Any) -> Any | None:
    """Return the network that a pipeline evaluates at every step, or None if it is unknown."""
    networks = (getattr(pipeline, name, None) for name in DENOISERS)
    return next((network for network in networks if isinstance(network, torch.nn.Module)), None)


def _denoiser_config(pipeline: Any) -> Mapping[str, Any]:
    return dict(getattr(find_denoiser(pipeline), "config", {}))


def find_guidance_argument(pipeline: Any) -> str | None:
    """Return the name of the parameter for a row's guidance_scale, or None if the scale would have no effect."""
    call = parameters_of(type(pipeline))
    names = [name for name in GUIDANCE if name in call and isinstance(call[name].default, (int, float))]
    if {"guidance_scale", "true_cfg_scale"} <= set(names) and not _is_embedded(_denoiser_config(pipeline)):
        return None  # a distilled Flux, whose network has no input for guidance_scale
    return names[0] if names else None


def _is_embedded(denoiser: Mapping[str, Any]) -> bool:
    return bool(denoiser.get("guidance_embeds")) or denoiser.get("time_cond_proj_dim") is not None


def build_without_weights(path: Path) -> Any:
    """Build a checkpoint's pipeline with networks that have no weights. Raises ModelError."""
    return build_pipeline(path, partial(_build_without_weights, path))


def _build_without_weights(path: Path, network_type: Any, name: str) -> Any | None:
    """Build a network on the meta device, which needs no memory. Returns None on an error."""
    folder = path / name
    try:
        with torch.device("meta"):
            if issubclass(network_type, ModelMixin):
                return network_type.from_config(network_type.load_config(folder, local_files_only=True))
            return network_type(network_type.config_class.from_pretrained(folder, local_files_only=True))
    except LOADING_ERRORS:
        return None


def _size_rules(pipeline: Any, denoiser: Mapping[str, Any]) -> SizeRules:
    """Return the pipeline's default image size, the side multiple that fits whole patches, and the shortest side.

    If a pipeline has stricter rules, rows that break them get an error when they are rendered.
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
