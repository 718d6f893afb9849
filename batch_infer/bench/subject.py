"""Load the model to benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from batch_infer.autotune import detect_device, explain_out_of_memory, find_plateau
from batch_infer.bench.probe import ModelProbe, make_probe
from batch_infer.bench.settings import PIPELINE_ARCHITECTURES, BenchSettings, Size
from batch_infer.errors import RowError, SettingsError
from batch_infer.jobs import choose_compute
from batch_infer.models import SamplingRules, build_architecture, read_card
from batch_infer.records import PromptRequest, SamplingParams, SizeRules, Source
from batch_infer.settings import BatchShape, Compute, RunSettings, TableSettings
from batch_infer.worker import load_model, optimize_model, prepare_torch

if TYPE_CHECKING:
    from batch_infer.models import AnyPipeline, LatentDiffusion

FEW_STEPS = (2, 4, 10, 20)
"""Step counts for warming up. With a single step, the schedule of Qwen-Image is not finite."""


@dataclass(frozen=True)
class Subject:
    """The loaded model that all contenders share, with its batch sizes, image sizes and default row parameters."""

    name: str
    model: LatentDiffusion | AnyPipeline
    compute: Compute
    sizes: SizeRules
    defaults: SamplingParams

    @cached_property
    def probe(self) -> ModelProbe:
        return make_probe(self.model)

    def evaluations(self, row: PromptRequest) -> int:
        """Return the batch elements of all denoiser calls of a row. Raises SettingsError if the model rejects it."""
        try:
            return self.probe.count_evaluations(row)
        except RowError as error:
            raise SettingsError(f"{self.name}: {error}; choose other --steps") from error

    @cached_property
    def few_steps(self) -> int:
        """The smallest of FEW_STEPS that the scheduler accepts, or the largest if it accepts none of them."""
        for steps in FEW_STEPS:
            params = replace(self.defaults, num_inference_steps=steps)
            try:
                self.evaluations(PromptRequest("steps", 0, "", None, 0, params, Source("bench", 0), ""))
            except SettingsError:
                continue
            return steps
        return FEW_STEPS[-1]


def load_subject(settings: BenchSettings, *, can_quantize: bool = True) -> Subject:
    """Load the model, or build the architecture. `can_quantize`: whether --quantize is advised if memory is too small.

    Raises ModelError, and SettingsError, for example if the device is missing or has too little memory.
    """
    device = detect_device(settings.model.device)
    run = RunSettings(TableSettings(()), ".", model=settings.model, compute=settings.compute)
    with explain_out_of_memory(settings.model, settings.compute, can_quantize=can_quantize, can_offload=False):
        if settings.architecture is not None:
            return _build(settings, choose_compute(run, device))
        card = read_card(settings.model)
        compute = choose_compute(run, device, card=card)
        model = load_model(card, compute, with_checker=False)
        return Subject(card.title, model, compute, card.sizes, _defaults(card))


def _build(settings: BenchSettings, compute: Compute) -> Subject:
    name = str(settings.architecture)
    if name in PIPELINE_ARCHITECTURES:
        # The same defaults as for a checkpoint: see choose_compute.
        is_half = settings.model.dtype == "auto" and compute.device == "cuda"
        dtype = "bfloat16" if is_half else compute.dtype
        compute = replace(compute, dtype=dtype, compiled=bool(settings.compute.compiled))
    model, rules = build_architecture(name, *prepare_torch(compute))
    optimize_model(model, compute)
    return Subject(f"{name}, random weights", model, compute, rules.sizes, _defaults(rules))


def _defaults(rules: SamplingRules) -> SamplingParams:
    sizes = rules.sizes
    return SamplingParams(
        sizes.native_height,
        sizes.native_width,
        rules.num_inference_steps,
        rules.guidance_scale,
        rules.guidance_rescale,
        rules.embedded_guidance,
    )


def tune_batch_sizes(subject: Subject, sizes: Sequence[Size]) -> Compute:
    """Return `subject.compute` with the batch sizes that `--slots auto` measures for these image sizes.

    Raises SettingsError if the model does not support a size, and torch.OutOfMemoryError if not even the smallest batch
    fits.
    """
    shapes = []
    for size in sizes:
        params = SamplingParams(*size, subject.few_steps, subject.defaults.guidance_scale, 0.0)
        try:
            plateau = find_plateau(subject.model, params)
        except RowError as error:
            raise SettingsError(f"{subject.name}: {error}; choose other --sizes") from error
        shapes.append(BatchShape(*size, plateau.slots, plateau.decode_batch))
    return subject.compute.with_shapes(shapes)
