"""Load diffusers' text-to-image pipelines without a model family, and run their rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ModelMixin
from transformers import PreTrainedTokenizerBase

from batch_infer.accelerator import is_device_error
from batch_infer.errors import FailedRowError, RowError, SettingsError, first_line
from batch_infer.models.acceleration import optimize_networks
from batch_infer.models.card import ModelCard, SamplingRules
from batch_infer.models.latent_diffusion import Conditioning
from batch_infer.models.loading import (
    RowLoraSwitch,
    add_embeddings,
    disable_sampling,
    fuse_loras,
    load_checker,
    load_network,
)
from batch_infer.models.offloading import offload_networks
from batch_infer.models.pipeline_arguments import CallArguments
from batch_infer.models.pipeline_rules import build_pipeline, find_denoiser
from batch_infer.models.quantization import quantize
from batch_infer.models.schedulers import build_scheduler
from batch_infer.models.textual_inversion import Embedding, expand_tokens
from batch_infer.models.trial_calls import (
    REFUSALS,
    TRIAL_TEXT,
    MakeTrialArguments,
    call_within_memory,
    check_pipeline,
    kept_processors,
)
from batch_infer.records import PromptRequest, RowCost, SamplingParams
from batch_infer.settings import Offload
from batch_infer.stacking import (
    ENCODE_BATCH,
    ROW_ERRORS,
    CallEvaluator,
    CallStacker,
    EncoderCache,
    Kind,
    Observer,
    copy_pipeline,
    make_stacking_plan,
    record_pipeline,
)

log = logging.getLogger(__name__)

SMALL_DIVISOR = 4
"""Fraction of the native side for trial calls on a CPU, where calls at the native size would take minutes.

On a GPU they have the native size if memory suffices, since kernels, on which the bytes depend, are chosen by shape.
"""


class AnyPipeline(RowLoraSwitch):
    """A loaded pipeline. Each row runs the pipeline's own call, and rows share the calls of its networks.

    The text encoders use eager attention: faster kernels omit the mask if no row of a batch needs one, so a row would
    depend on its neighbours.
    """

    uses_pipeline_call: ClassVar[bool] = True
    min_slots: ClassVar[int] = 1
    """Smallest batch size of a denoiser call. A row whose calls have more elements makes them alone."""

    def __init__(
        self,
        pipeline: Any,
        rules: SamplingRules,
        device: torch.device,
        dtype: torch.dtype,
        replaced_scheduler: Any | None = None,
    ) -> None:
        """Call the pipeline a few times to find out how its calls can be stacked.

        `replaced_scheduler` is the checkpoint's scheduler if --scheduler replaced it.
        Raises ModelError if its components do not fit together, or if more than the seeds determines the noise.
        """
        self.pipeline, self.device, self.dtype = pipeline, device, dtype
        self.safety_checker: Any | None = None
        self.feature_extractor: Any | None = None
        self.denoiser: torch.nn.Module | None = find_denoiser(pipeline)
        self._embeddings: Sequence[Embedding] = ()
        self._arguments = CallArguments(pipeline, rules)
        self._rules, self._cache = rules, EncoderCache()
        self._recorded: dict[object, Any] = {}
        """Results of networks by the shapes of their arguments, for `count_cost`."""
        disable_sampling(pipeline)
        native, small = (partial(self._arguments.make_trial, divisor=divisor) for divisor in (1, SMALL_DIVISOR))

        def check(make_arguments: MakeTrialArguments) -> None:
            check_pipeline(pipeline, self.denoiser, lambda: make_arguments([TRIAL_TEXT], True), replaced_scheduler)

        with kept_processors(self.denoiser):
            call_within_memory(check, native, small)
            if device.type == "cpu":
                self.plan = make_stacking_plan(pipeline, small, native)  # some pipelines refuse small sizes
            else:
                self.plan = call_within_memory(partial(make_stacking_plan, pipeline), native, small)

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
        pipeline = build_pipeline(card.path, partial(_load, card, dtype))
        replaced_scheduler = None
        if card.scheduler is not None:
            replaced_scheduler = pipeline.scheduler
            pipeline.scheduler = build_scheduler(card.scheduler, replaced_scheduler)
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
        model = cls(pipeline, card, device, dtype, replaced_scheduler)
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

    def compile(self, threads: int) -> None:
        """Compile the denoisers. Raises SettingsError if the shapes of their calls vary from row to row."""
        if not self.plan.is_stacked:
            raise SettingsError(
                f"--compile: the shapes of the denoiser calls of {type(self.pipeline).__name__} vary from row to row; "
                "remove --compile"
            )
        optimize_networks(self.networks, self.device, compiled=True, threads=threads)

    def clear_embeddings(self) -> None:
        self._cache.clear()

    def make_evaluator(self, slots: int, decode_batch: int, observe: Observer) -> CallEvaluator:
        """Return an evaluator for rows of one image size. `observe` is called with each network call."""
        sizes: dict[Kind, int] = {"encode": ENCODE_BATCH, "denoise": slots, "decode": decode_batch}
        return CallEvaluator(self.plan, sizes, observe, self._cache)

    def make_arguments(self, request: PromptRequest) -> dict[str, Any]:
        """Return the arguments of a row's call, in new objects because some pipelines modify them."""
        return self._arguments.make([request.prompt], request.negative_prompt, [request.seed], request.params)

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
        return images[0].to(self.device, torch.float32)

    def count_cost(self, params: SamplingParams, negative_prompt: str | None) -> RowCost:
        """Return the cost of a row, counted in a call that reuses the results of the first call of each network.

        Raises RowError if the pipeline does not support the values. The prompt and the image size do not matter.
        """
        sizes = self._rules.sizes
        params = replace(params, height=sizes.native_height, width=sizes.native_width)
        row_pipeline = copy_pipeline(self.pipeline, self.plan.device, host_timesteps=self.plan.host_timesteps)
        arguments = self._arguments.make([TRIAL_TEXT], negative_prompt, [0], params)
        try:
            calls = record_pipeline(row_pipeline, self.plan.networks, arguments, self._recorded)
        except REFUSALS as error:
            raise self._refuse(error) from error
        except ROW_ERRORS as error:
            if is_device_error(error):
                raise
            raise FailedRowError(f"{type(self.pipeline).__name__} failed: {first_line(error)}") from error
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
        evaluator = self.make_evaluator(slots, 1, lambda kind: nullcontext())
        stacker: CallStacker[int] = CallStacker(self.pipeline, evaluator)
        prompts, seeds = [TRIAL_TEXT], [0]
        try:
            count = self.count_rows(slots, params)
            stacker.start([(index, self._arguments.make(prompts, None, seeds, params)) for index in range(count)])
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
        # Some pipelines have a processor, whose first argument is an image, or the path or URL of one to open.
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        count = None
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            (prompt,) = expand_tokens([request.prompt], self._embeddings)
            count = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        return Conditioning(({}, None), count, None)


def _load(card: ModelCard, dtype: torch.dtype, network_type: Any, name: str) -> Any:
    """Load a network in a dtype, except for layers that need float32, such as those of T5 that would overflow."""
    if issubclass(network_type, ModelMixin):
        return load_network(network_type, card, name, torch_dtype=dtype)
    return load_network(network_type, card, name, dtype=dtype, attn_implementation="eager", trust_remote_code=False)
