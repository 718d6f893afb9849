"""diffusers' own text-to-image pipelines, for which there is no family: which can be driven, and what they take."""

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
from batch_infer.models.components import named_components
from batch_infer.models.layouts import ANY, CHECKER, SamplingRules
from batch_infer.models.loading import make_pipeline
from batch_infer.models.untrusted import LOADING_ERRORS, LoadingErrors, read_object
from batch_infer.records import SizeRules

ASKED = ("prompt", "generator", "height", "width", "num_inference_steps", "num_images_per_prompt", "output_type")
"""Arguments that the call of a text-to-image pipeline takes."""
PICTURES = {"control_image", "mask_image"}
FRAMES = {"num_frames", "video_length"}
GUIDANCE = ("guidance_scale", "true_cfg_scale", "prior_guidance_scale")
"""Arguments that a row's guidance_scale may stand for: the first one that is a number where nobody says."""
DENOISERS = ("transformer", "unet", "prior_prior", "prior")
SIDE = 1024
"""The native side, in pixels, where a pipeline does not say."""


def find_class(name: str) -> Any:
    """A pipeline class that makes images of texts alone. Raises ModelError."""
    found: Any = getattr(diffusers, name, None)
    if backends := getattr(found, "_backends", None):
        needs = [library for library in backends if find_spec(library) is None]
        raise ModelError(f"{name} needs {' and '.join(needs)}: pip install {' '.join(needs)}")
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise ModelError(f"diffusers {diffusers.__version__} has no pipeline {name}; a later one may")
    call = parameters_of(found)
    if lacking := [argument for argument in ASKED if argument not in call]:
        raise ModelError(f"{name} makes no images of texts: its call takes no {', '.join(lacking)}")
    if call["output_type"].default != "pil" or FRAMES & call.keys():
        raise ModelError(f"{name} makes no images of texts, but something else")
    if wanted := sorted(_wanted_beside_text(found, call)):
        raise ModelError(f"{name} needs more than a text: {', '.join(wanted)}")
    return found


def parameters_of(kind: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of a pipeline's call."""
    return inspect.signature(kind.__call__).parameters


def _wanted_beside_text(kind: Any, call: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    for name, argument in list(call.items())[1:]:
        named = argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
        if name in PICTURES or (named and argument.default is argument.empty and name != "prompt"):
            yield name
    if "image" in call:
        # Loads every pipeline that diffusers has, so it is asked last.
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

        if kind not in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
            yield "image"
    yield from {"controlnet", "adapter"} & inspect.signature(kind.__init__).parameters.keys()


def network_classes(path: Path) -> dict[str, Any]:
    """The classes of a checkpoint's networks, by component; all but those that are not read. Raises ModelError."""
    found = {}
    for name, (library, kind) in named_components(_index(path), path.name).items():
        module: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
        with LoadingErrors(f"{path}: {name} ({kind})"):
            known = getattr(module or getattr(diffusers.pipelines, library), kind, None)
        if name in ANY.unread | CHECKER:
            continue
        if known is None:
            raise ModelError(f"{path}: {name} is a {kind}, which {library} does not have; a later version may")
        if isinstance(known, type) and (issubclass(known, torch.nn.Module) or hasattr(known, "_model_mapping")):
            found[name] = known
    return found


def pipeline_class(path: Path) -> Any:
    """The class that a checkpoint's model_index.json names. Raises ModelError."""
    return find_class(_index(path)["_class_name"])


def _index(path: Path) -> dict[str, Any]:
    return read_object(path / "model_index.json", path.name)


def left_out(kind: Any, path: Path) -> dict[str, Any]:
    """What a pipeline is told to do without: what the checkpoint does not hold, ANY.unread, and a checker of its own.

    Images are judged by ours.
    """
    taken = inspect.signature(kind.__init__).parameters
    absent = [name for name, value in _index(path).items() if isinstance(value, list) and value[:1] == [None]]
    without = {**dict.fromkeys([*absent, *CHECKER, *ANY.unread]), "requires_safety_checker": False}
    return {name: value for name, value in without.items() if name in taken}


def read_facts(path: Path) -> SamplingRules:
    """What rows may ask of a checkpoint, told from its pipeline's call and settings, without its weights.

    Raises ModelError.
    """
    kind = pipeline_class(path)
    networks = {name: _without_weights(network, path / name) for name, network in network_classes(path).items()}
    pipeline = make_pipeline(kind, path, {**networks, **left_out(kind, path)})
    with LoadingErrors(f"{path}: the settings of {kind.__name__}"):
        return _facts_of(kind, pipeline)


def _facts_of(kind: Any, pipeline: Any) -> SamplingRules:
    call, denoiser = parameters_of(kind), denoiser_settings(pipeline)
    steps = call["num_inference_steps"].default
    guidance = guidance_argument(kind, denoiser)
    taken = {"guidance_scale": guidance, "negative_prompt": takes_negative(kind, denoiser)}
    taken["guidance_rescale"] = "guidance_rescale" in call
    nothing = {"guidance_scale": 1.0, "negative_prompt": None, "guidance_rescale": 0.0}
    return SamplingRules(
        _sizes(pipeline, denoiser),
        steps if isinstance(steps, int) else 50,
        float(call[guidance].default) if guidance else 1.0,
        embedded_guidance=_is_embedded(denoiser),
        fixed=tuple((name, value) for name, value in nothing.items() if not taken[name]),
    )


def denoiser_of(pipeline: Any) -> Any | None:
    """The network that a pipeline asks at every step."""
    found = (getattr(pipeline, name, None) for name in DENOISERS)
    return next((network for network in found if isinstance(network, torch.nn.Module)), None)


def denoiser_settings(pipeline: Any) -> Mapping[str, Any]:
    return dict(getattr(denoiser_of(pipeline), "config", {}))


def guidance_argument(kind: Any, denoiser: Mapping[str, Any]) -> str | None:
    """What a row's guidance_scale is handed in as, None where it would change nothing."""
    call = parameters_of(kind)
    found = [name for name in GUIDANCE if name in call and isinstance(call[name].default, (int, float))]
    if {"guidance_scale", "true_cfg_scale"} <= set(found) and not _is_embedded(denoiser):
        return None  # a distilled Flux: its network does not take what guidance_scale stands for there
    return found[0] if found else None


def takes_negative(kind: Any, denoiser: Mapping[str, Any]) -> bool:
    """Whether a negative prompt has a part in the guidance that a row asks for."""
    call = parameters_of(kind)
    embedded = "true_cfg_scale" in call and guidance_argument(kind, denoiser) != "true_cfg_scale"
    return "negative_prompt" in call and not embedded


def _is_embedded(denoiser: Mapping[str, Any]) -> bool:
    return bool(denoiser.get("guidance_embeds")) or denoiser.get("time_cond_proj_dim") is not None


def _without_weights(kind: Any, folder: Path) -> Any | None:
    """A network on the meta device, which has shapes and no memory; None where it cannot be made so."""
    try:
        with torch.device("meta"):
            if issubclass(kind, ModelMixin):
                return kind.from_config(kind.load_config(folder, local_files_only=True))
            return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    except LOADING_ERRORS:
        return None


def _sizes(pipeline: Any, denoiser: Mapping[str, Any]) -> SizeRules:
    """Native sides as the call has them where nobody says, and multiples that leave no half patches.

    A pipeline that wants more refuses the row, and then its sentence is the row's.
    """
    names = ("vae_scale_factor", "vae_scale_factor_spatial")
    scale = next((value for name in names if isinstance(value := getattr(pipeline, name, None), int)), None)
    native = getattr(pipeline, "default_sample_size", None) or denoiser.get("sample_size")
    sides = [side * (scale or 1) for side in native] if isinstance(native, (list, tuple)) else []
    if isinstance(native, int):
        sides = [native * (scale or 1)] * 2
    call = parameters_of(type(pipeline))
    told = [call[name].default for name in ("height", "width")]
    height, width = told if all(isinstance(side, int) for side in told) else sides[:2] or (SIDE, SIDE)
    levels = len(denoiser.get("block_out_channels", ()))
    factor = gcd(height, width, (scale or 8) * (1 if levels else 2))
    return SizeRules(height, width, factor, factor * 2 ** max(0, levels - 1))
