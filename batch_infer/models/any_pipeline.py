"""Build, inspect and call diffusers' text-to-image pipelines without a model family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin

from batch_infer.accelerator import is_device_error, out_of_memory_errors
from batch_infer.errors import FailedRowError, ModelError, RowError, first_line
from batch_infer.models.card import ModelCard, SamplingRules
from batch_infer.models.components import named_components
from batch_infer.models.families import CHECKER_COMPONENTS, OTHER_FAMILY
from batch_infer.models.latent_diffusion import Conditioning
from batch_infer.models.loading import load_checker, load_network, load_pipeline
from batch_infer.models.trial_calls import REFUSALS, can_share_calls
from batch_infer.models.untrusted import LOADING_ERRORS, loading_errors, read_object
from batch_infer.records import PromptRequest, SizeRules
from batch_infer.settings import SchedulerSpec

REQUIRED = ("prompt", "generator", "height", "width", "num_inference_steps", "num_images_per_prompt", "output_type")
"""Parameters that a text-to-image pipeline's `__call__` must have."""
IMAGE_INPUTS = {"control_image", "mask_image"}
VIDEO_INPUTS = {"num_frames", "video_length"}
GUIDANCE = ("guidance_scale", "true_cfg_scale", "prior_guidance_scale")
"""Candidates for the parameter that receives a row's guidance_scale. `_guidance_argument` chooses one."""
DENOISERS = ("transformer", "unet", "prior_prior", "prior")
"""Components that may be the denoiser. The first that is a network is used."""
NATIVE_SIDE = 1024
"""Default image side in pixels for a pipeline that defines none."""


class AnyPipeline:
    """A loaded pipeline. The rows of a call differ only in their texts and seeds.

    The text encoders use eager attention: faster kernels omit the mask if no row of a batch needs one, so a row would
    depend on its neighbours.
    """

    uses_pipeline_call = True

    def __init__(self, pipeline: Any, card: ModelCard, device: torch.device, dtype: torch.dtype) -> None:
        self.pipeline, self.device, self.dtype = pipeline, device, dtype
        self.safety_checker: Any | None = None
        self.feature_extractor: Any | None = None
        self.denoiser: torch.nn.Module | None = _find_denoiser(pipeline)
        self.networks: Sequence[torch.nn.Module] = ()
        """Networks that can be compiled: none, because their shapes may vary."""
        self._guidance = _guidance_argument(pipeline)
        self._parameters = _parameters_of(type(pipeline))
        arguments = {
            "height": card.sizes.native_height,
            "width": card.sizes.native_width,
            "num_inference_steps": card.num_inference_steps,
        }
        self.needs_separate_calls: bool = not can_share_calls(pipeline, self.denoiser, card.path, arguments)
        """Whether a row in a shared call could depend on the text lengths of other rows."""

    @classmethod
    def load(cls, card: ModelCard, device: torch.device, dtype: torch.dtype, *, with_checker: bool) -> AnyPipeline:
        """Load a checkpoint and optionally its safety checker. Raises ModelError."""
        pipeline = _build_pipeline(card.path, partial(_load, card, dtype), card.scheduler)
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
            pipeline.vae.enable_slicing()  # decodes images separately: less memory, and equal bytes in any batch
        model = cls(pipeline, card, device, dtype)
        if with_checker:
            model.safety_checker, model.feature_extractor = load_checker(card, device, dtype)
        return model

    def render(self, requests: Sequence[PromptRequest], batch: int) -> torch.Tensor:
        """Render at most `batch` rows to float32 images (R, 3, H, W) on the CPU: 0 is black and 1 is white.

        Rows get separate calls, or share one call, which is padded to `batch` with copies of the last row. Raises
        RowError if the pipeline does not support a row, FailedRowError for other RuntimeErrors and TypeErrors of the
        pipeline, and device errors unchanged.
        """
        if self.needs_separate_calls:
            return torch.cat([self._call([request]) for request in requests])
        padding = [requests[-1]] * (batch - len(requests))
        return self._call([*requests, *padding])[: len(requests)]

    def count_tokens(self, request: PromptRequest) -> Conditioning:
        """Count a prompt's tokens with the pipeline's `tokenizer`, if it has one.

        Whether the pipeline truncates the prompt is unknown.
        """
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        count = len(tokenizer(request.prompt, add_special_tokens=False).input_ids) if callable(tokenizer) else None
        return Conditioning(({}, None), count, None)

    def _call(self, requests: Sequence[PromptRequest]) -> torch.Tensor:
        params, name = requests[0].params, type(self.pipeline).__name__
        try:
            with out_of_memory_errors():
                images = self.pipeline(**self._make_arguments(requests)).images
        except (*REFUSALS, RuntimeError, TypeError) as error:
            if is_device_error(error):
                raise
            if isinstance(error, REFUSALS):
                raise RowError(f"{name} does not support this row: {first_line(error)}") from error
            raise FailedRowError(f"{name} failed: {first_line(error)}") from error
        # Some pipelines silently round sizes.
        if np.shape(images) != (len(requests), params.height, params.width, 3):
            height, width = np.shape(images)[1:3] if np.ndim(images) == 4 else (0, 0)
            raise RowError(
                f"{name} makes images of {width}x{height} pixels instead of {params.width}x{params.height}; try "
                "multiples of 32"
            )
        return torch.from_numpy(np.asarray(images, dtype=np.float32)).permute(0, 3, 1, 2)

    def _make_arguments(self, requests: Sequence[PromptRequest]) -> dict[str, Any]:
        """Return the arguments of a call for rows, in new lists because some pipelines modify them."""
        first = requests[0]
        params = first.params
        arguments: dict[str, Any] = {
            "prompt": [request.prompt for request in requests],
            "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in requests],
            "height": params.height,
            "width": params.width,
            "num_inference_steps": params.num_inference_steps,
            "output_type": "np",
        }
        if self._guidance:
            arguments[self._guidance] = params.guidance_scale
        if "clean_caption" in self._parameters:
            arguments["clean_caption"] = False  # the default depends on whether beautifulsoup4 and ftfy are installed
        if "guidance_rescale" in self._parameters:
            arguments["guidance_rescale"] = params.guidance_rescale
        if first.negative_prompt is not None:
            arguments["negative_prompt"] = [request.negative_prompt for request in requests]
        elif self._guidance == "true_cfg_scale" and params.uses_guidance:
            arguments["negative_prompt"] = [" "] * len(requests)  # otherwise the pipeline omits guidance
        return arguments


def _load(card: ModelCard, dtype: torch.dtype, network_type: Any, name: str) -> Any:
    """Load a network in a dtype, except for layers that need float32, such as those of T5 that would overflow."""
    if issubclass(network_type, ModelMixin):
        return load_network(network_type, card, name, torch_dtype=dtype)
    return load_network(network_type, card, name, dtype=dtype, attn_implementation="eager", trust_remote_code=False)


def find_class(name: str) -> Any:
    """Return diffusers' pipeline class `name`. Raises ModelError if it is unavailable or not text-to-image."""
    pipeline_type: Any = getattr(diffusers, name, None)
    if backends := getattr(pipeline_type, "_backends", None):
        missing = [library for library in backends if find_spec(library) is None]
        raise ModelError(f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if not (isinstance(pipeline_type, type) and issubclass(pipeline_type, DiffusionPipeline)):
        raise ModelError(f"diffusers {diffusers.__version__} has no pipeline {name}; a later version may have it")
    call = _parameters_of(pipeline_type)
    if absent := [parameter for parameter in REQUIRED if parameter not in call]:
        raise ModelError(f"{name} is not text-to-image: its __call__ has no {', '.join(absent)}")
    if call["output_type"].default != "pil" or VIDEO_INPUTS & call.keys():
        raise ModelError(f"{name} is not text-to-image: its output is not an image")
    if inputs := sorted(_list_other_inputs(pipeline_type, call)):
        raise ModelError(f"{name} needs inputs other than text: {', '.join(inputs)}")
    return pipeline_type


def _parameters_of(pipeline_type: Any) -> Mapping[str, inspect.Parameter]:
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


def _build_pipeline(path: Path, load: Callable[[Any, str], Any], scheduler: SchedulerSpec | None = None) -> Any:
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
        is_network = isinstance(component_type, type) and issubclass(component_type, torch.nn.Module)
        if is_network or hasattr(component_type, "_model_mapping"):
            modules[name] = load(component_type, name)
    return load_pipeline(pipeline_type, path, modules, scheduler)


def inspect_pipeline(path: Path) -> SamplingRules:
    """Derive a checkpoint's sampling rules from its pipeline class and configs, without weights. Raises ModelError."""
    pipeline = _build_pipeline(path, partial(_build_without_weights, path))
    with loading_errors(f"{path}: the configs of {type(pipeline).__name__}"):
        return make_rules(pipeline)


def make_rules(pipeline: Any) -> SamplingRules:
    """Derive sampling rules from a pipeline's class and the configs of its networks."""
    call, config = _parameters_of(type(pipeline)), _denoiser_config(pipeline)
    steps, guidance = call["num_inference_steps"].default, _guidance_argument(pipeline)
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


def _find_denoiser(pipeline: Any) -> Any | None:
    """Return the network that a pipeline evaluates at every step, or None if it is unknown."""
    networks = (getattr(pipeline, name, None) for name in DENOISERS)
    return next((network for network in networks if isinstance(network, torch.nn.Module)), None)


def _denoiser_config(pipeline: Any) -> Mapping[str, Any]:
    return dict(getattr(_find_denoiser(pipeline), "config", {}))


def _guidance_argument(pipeline: Any) -> str | None:
    """Return the name of the parameter for a row's guidance_scale, or None if the scale would have no effect."""
    call = _parameters_of(type(pipeline))
    names = [name for name in GUIDANCE if name in call and isinstance(call[name].default, (int, float))]
    if {"guidance_scale", "true_cfg_scale"} <= set(names) and not _is_embedded(_denoiser_config(pipeline)):
        return None  # a distilled Flux, whose network has no input for guidance_scale
    return names[0] if names else None


def _is_embedded(denoiser: Mapping[str, Any]) -> bool:
    return bool(denoiser.get("guidance_embeds")) or denoiser.get("time_cond_proj_dim") is not None


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
    call = _parameters_of(type(pipeline))
    defaults = [call[name].default for name in ("height", "width")]
    height, width = defaults if all(isinstance(side, int) for side in defaults) else sides[:2] or [NATIVE_SIDE] * 2
    levels = len(denoiser.get("block_out_channels", ()))
    factor = gcd(height, width, (scale or 8) * (1 if levels else 2))
    return SizeRules(height, width, factor, factor * 2 ** max(0, levels - 1))
