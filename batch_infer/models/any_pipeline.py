"""Build, inspect and call diffusers' text-to-image pipelines without a model family."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import TextualInversionLoaderMixin

from batch_infer.errors import FailedRowError, ModelError, RowError, SettingsError, first_line
from batch_infer.models.acceleration import optimize_networks
from batch_infer.models.card import ModelCard, SamplingRules
from batch_infer.models.components import named_components
from batch_infer.models.families import CHECKER_COMPONENTS, OTHER_FAMILY
from batch_infer.models.latent_diffusion import Conditioning
from batch_infer.models.loading import (
    add_embeddings,
    fuse_loras,
    load_checker,
    load_network,
    load_pipeline,
    load_row_loras,
)
from batch_infer.models.offloading import offload_networks
from batch_infer.models.quantization import quantize
from batch_infer.models.textual_inversion import Embedding, expand_tokens
from batch_infer.models.trial_calls import REFUSALS, TRIAL_TEXT, check_pipeline, kept_processors
from batch_infer.models.untrusted import LOADING_ERRORS, loading_errors, read_object
from batch_infer.records import Lora, PromptRequest, RowCost, SamplingParams, SizeRules
from batch_infer.settings import Offload, SchedulerSpec
from batch_infer.stacking import (
    ENCODE_BATCH,
    CallStacker,
    EncoderCache,
    Kind,
    Observer,
    copy_pipeline,
    make_plan,
    record_pipeline,
)

if TYPE_CHECKING:
    from batch_infer.models.lora_fusing import RowLoras

log = logging.getLogger(__name__)

REQUIRED = ("prompt", "generator", "height", "width", "num_inference_steps", "num_images_per_prompt", "output_type")
"""Parameters that a text-to-image pipeline's `__call__` must have."""
IMAGE_INPUTS = {"control_image", "mask_image"}
VIDEO_INPUTS = {"num_frames", "video_length"}
GUIDANCE = ("guidance_scale", "true_cfg_scale", "prior_guidance_scale")
"""Candidates for the parameter that receives a row's guidance_scale. `_guidance_argument` chooses one."""
DENOISERS = ("transformer", "unet", "prior_prior", "prior")
"""Components that may be the denoiser. The first that is a network is used."""
CPU_DIVISOR = 4
"""Fraction of the native side for trial calls on a CPU, where calls at the native size would take minutes.

On a GPU they have the native size, since kernels, on which the bytes depend, are chosen by shape.
"""
NATIVE_SIDE = 1024
"""Default image side in pixels for a pipeline that defines none."""


class AnyPipeline:
    """A loaded pipeline. Each row runs the pipeline's own call, and rows share the calls of its networks.

    The text encoders use eager attention: faster kernels omit the mask if no row of a batch needs one, so a row would
    depend on its neighbours.
    """

    uses_pipeline_call: ClassVar[bool] = True
    min_slots: ClassVar[int] = 1
    """Smallest batch size of a denoiser call. A row whose calls have more elements makes them alone."""

    def __init__(self, pipeline: Any, rules: SamplingRules, device: torch.device, dtype: torch.dtype) -> None:
        """Call the pipeline a few times to find out how its calls can be stacked.

        Raises ModelError if its components do not fit together, or if more than the seeds determines the noise.
        """
        self.pipeline, self.device, self.dtype = pipeline, device, dtype
        self.safety_checker: Any | None = None
        self.feature_extractor: Any | None = None
        self.denoiser: torch.nn.Module | None = _find_denoiser(pipeline)
        self._embeddings: Sequence[Embedding] = ()
        self._row_loras: RowLoras | None = None
        self.lora: Lora | None = None
        """The LoRA of the current rows, which `use_lora` has added to the weights."""
        self._guidance = _guidance_argument(pipeline)
        self._parameters = _parameters_of(type(pipeline))
        # Pipelines with an image processor return tensors, which are copied to the host in background.
        self._output_type = "pt" if hasattr(pipeline, "image_processor") else "np"
        self._rules, self._cache = rules, EncoderCache()
        self._recorded: dict[object, Any] = {}
        """Results of networks by the shapes of their arguments, for `count_cost`."""
        with kept_processors(self.denoiser):
            native, small = (partial(self._make_trial_arguments, divisor=divisor) for divisor in (1, CPU_DIVISOR))
            is_on_cpu = device.type == "cpu"
            check_pipeline(pipeline, self.denoiser, partial(native, [TRIAL_TEXT], guided=True))
            self.plan = make_plan(pipeline, small if is_on_cpu else native)
            if is_on_cpu and self.plan.is_alone:  # perhaps only because the pipeline does not support the size
                self.plan = make_plan(pipeline, native)

    @classmethod
    def load(
        cls,
        card: ModelCard,
        device: torch.device,
        dtype: torch.dtype,
        *,
        with_checker: bool,
        offload: Offload | None = None,
    ) -> AnyPipeline:
        """Load a checkpoint and optionally its safety checker. Raises ModelError."""
        pipeline = _build_pipeline(card.path, partial(_load, card, dtype), card.scheduler)
        add_embeddings(pipeline, card)
        fuse_loras(pipeline, card)
        checker, feature_extractor = load_checker(card, device, dtype) if with_checker else (None, None)
        if card.quantize is not None:
            quantize(pipeline.components, card.quantize, card.name)
        if offload is None:
            pipeline.to(device)
        else:
            offload_networks(pipeline.components.values(), device, offload, checker)
        pipeline.set_progress_bar_config(disable=True)
        model = cls(pipeline, card, device, dtype)
        model.safety_checker, model.feature_extractor = checker, feature_extractor
        model._embeddings = card.embeddings
        model._log_reasons()
        return model

    def _log_reasons(self) -> None:
        name, reasons = type(self.pipeline).__name__, "; ".join(self.plan.reasons)
        if self.plan.is_alone:
            log.warning("the rows of %s run one at a time: %s", name, reasons)
        elif reasons:
            log.warning("the rows of %s share only some calls: %s", name, reasons)

    @property
    def networks(self) -> Sequence[torch.nn.Module]:
        """Networks that can be compiled: the denoisers, if all their calls have one shape per image size."""
        denoisers = [network.module for network in self.plan.networks if network.kind == "denoise"]
        return denoisers if self.plan.is_stacked else ()

    def use_lora(self, lora: Lora | None) -> None:
        """Add a LoRA to the weights for the next rows, or remove it with None. Raises RowError if it does not fit."""
        if self._row_loras is None:
            self._row_loras = load_row_loras(self.pipeline)
        try:
            self._row_loras.use(lora)
        finally:
            self.lora = self._row_loras.current
            self._cache.clear()

    def compile(self, threads: int) -> None:
        """Compile the denoisers. Raises SettingsError if the shapes of their calls vary from row to row."""
        if not self.plan.is_stacked:
            raise SettingsError(
                f"--compile: the shapes of the denoiser calls of {type(self.pipeline).__name__} vary from row to row; "
                "remove --compile"
            )
        optimize_networks(self.networks, self.device, compiled=True, threads=threads)

    def clear_embeddings(self) -> None:
        """Encode all prompts again from now on."""
        self._cache.clear()

    def make_stacker(self, slots: int, decode_batch: int, observe: Observer) -> CallStacker[Any]:
        """Return a stacker for rows of one image size. `observe` is called with each network call."""
        sizes: dict[Kind, int] = {"encode": ENCODE_BATCH, "denoise": slots, "decode": decode_batch}
        return CallStacker(self.pipeline, self.plan, sizes, observe, self._cache)

    def make_arguments(self, request: PromptRequest) -> dict[str, Any]:
        """Return the arguments of a row's call, in new objects because some pipelines modify them."""
        seeds = [request.seed]
        return self._make_arguments([request.prompt], request.negative_prompt, seeds, request.params)

    def read_image(self, request: PromptRequest, result: Any, error: Exception | None) -> torch.Tensor:
        """Return the image of a row's call as a float32 tensor (3, H, W): 0 is black and 1 is white.

        Raises RowError if the pipeline does not support the row, and FailedRowError for other errors of the pipeline.
        """
        name, params = type(self.pipeline).__name__, request.params
        if isinstance(error, REFUSALS):
            raise self._refuse(error) from error
        if error is not None:
            raise FailedRowError(f"{name} failed: {first_line(error)}") from error
        images = result[0]  # named `images`, except by Kandinsky 5
        if not isinstance(images, torch.Tensor):
            array = np.asarray(images, dtype=np.float32)
            images = torch.from_numpy(array).movedim(-1, 1) if array.ndim == 4 else torch.from_numpy(array)
        # Some pipelines silently round sizes.
        if images.shape != (1, 3, params.height, params.width):
            height, width = images.shape[2:] if images.ndim == 4 else (0, 0)
            raise RowError(
                f"{name} makes images of {width}x{height} pixels instead of {params.width}x{params.height}; try "
                "multiples of 32"
            )
        return images[0].float()

    def count_cost(self, params: SamplingParams, negative_prompt: str | None) -> RowCost:
        """Return the cost of a row, counted in a call that reuses the results of the first call of each network.

        Raises RowError if the pipeline does not support the values. The prompt and the image size do not matter.
        """
        sizes = self._rules.sizes
        params = replace(params, height=sizes.native_height, width=sizes.native_width)
        row_pipeline = copy_pipeline(self.pipeline, host_timesteps=self.plan.host_timesteps)
        arguments = self._make_arguments([TRIAL_TEXT], negative_prompt, [0], params)
        try:
            calls = record_pipeline(row_pipeline, self.plan.networks, arguments, self._recorded)
        except REFUSALS as error:
            raise self._refuse(error) from error
        counts = [
            self.plan.count_elements(call.network, call.arguments) for call in calls if call.network.kind == "denoise"
        ]
        return RowCost(len(counts), max(counts, default=1), is_alone=not self.plan.is_stacked)

    def count_rows(self, slots: int, params: SamplingParams) -> int:
        """Return how many rows with these parameters are denoised at a time."""
        cost = self.count_cost(params, None)
        return 1 if cost.is_alone else max(1, slots // cost.slots)

    def make_call(self, slots: int, params: SamplingParams) -> Callable[[], object]:
        """Return a function that makes one denoiser call, with all slots filled with rows with these parameters.

        Raises RowError if the pipeline does not support them.
        """
        stacker = self.make_stacker(slots, 1, lambda kind: nullcontext())
        prompts, seeds = [TRIAL_TEXT], [0]
        try:
            count = self.count_rows(slots, params)
            stacker.start([(index, self._make_arguments(prompts, None, seeds, params)) for index in range(count)])
            stacker.admit()
            for row in stacker.take_ended():
                raise self._refuse(row.error or ValueError("the call ended without a denoiser call"))
            return stacker.next_call()
        finally:
            stacker.close()

    def _refuse(self, error: Exception) -> RowError:
        return RowError(f"{type(self.pipeline).__name__} does not support this row: {first_line(error)}")

    def decode(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (B, 3, H, W) as they are, since the pipeline's call has decoded them."""
        return images

    def count_tokens(self, request: PromptRequest) -> Conditioning:
        """Count a prompt's tokens with the pipeline's `tokenizer`, if it has one.

        Whether the pipeline truncates the prompt is unknown.
        """
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        (prompt,) = expand_tokens([request.prompt], self._embeddings)
        count = len(tokenizer(prompt, add_special_tokens=False).input_ids) if callable(tokenizer) else None
        return Conditioning(({}, None), count, None)

    def _make_trial_arguments(self, prompts: Sequence[str], guided: bool, divisor: int) -> dict[str, Any]:
        """Return the arguments of a trial call with the model's defaults, for a fraction of its native side."""
        rules, sizes = self._rules, self._rules.sizes
        scale = (rules.guidance_scale if rules.guidance_scale > 1 else 2.0) if guided else 1.0
        height, width = (
            max(sizes.min_side, side // divisor // sizes.side_multiple * sizes.side_multiple)
            for side in (sizes.native_height, sizes.native_width)
        )
        params = SamplingParams(height, width, rules.num_inference_steps, scale, 0.0, rules.embedded_guidance)
        return self._make_arguments(prompts, None, range(len(prompts)), params)

    def _make_arguments(
        self, prompts: Sequence[str], negative: str | None, seeds: Sequence[int], params: SamplingParams
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "prompt": list(prompts),
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "height": params.height,
            "width": params.width,
            "num_inference_steps": params.num_inference_steps,
            "output_type": self._output_type,
        }
        if self._guidance:
            arguments[self._guidance] = params.guidance_scale
        if "clean_caption" in self._parameters:
            arguments["clean_caption"] = False  # the default depends on whether beautifulsoup4 and ftfy are installed
        if "guidance_rescale" in self._parameters:
            arguments["guidance_rescale"] = params.guidance_rescale
        if negative is not None:
            arguments["negative_prompt"] = [negative] * len(prompts)
        elif self._guidance == "true_cfg_scale" and params.uses_guidance:
            arguments["negative_prompt"] = [" "] * len(prompts)  # otherwise the pipeline omits guidance
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
        supports_lora=hasattr(pipeline, "load_lora_weights"),
        supports_embeddings=isinstance(pipeline, TextualInversionLoaderMixin),
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
