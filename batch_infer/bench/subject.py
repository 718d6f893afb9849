"""Load the model to benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from batch_infer.autotune import detect_device, explain_out_of_memory, find_plateau
from batch_infer.bench.settings import BenchSettings, Size
from batch_infer.errors import RowError, SettingsError
from batch_infer.jobs import choose_compute
from batch_infer.models import build_architecture, optimize_networks, read_card
from batch_infer.records import SamplingParams, SizeRules
from batch_infer.settings import BatchShape, Compute, RunSettings, TableSettings
from batch_infer.worker import load_model, prepare_torch

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion

FEW_STEPS = (1, 2, 4, 10, 20)


@dataclass(frozen=True, slots=True)
class Subject:
    """The loaded model that all contenders share, with its batch sizes, image sizes and default row parameters."""

    name: str
    model: LatentDiffusion
    compute: Compute
    sizes: SizeRules
    defaults: SamplingParams

    def evaluations(self, steps: int) -> int:
        """Return the number of model calls for a row. Raises SettingsError if the scheduler refuses these steps."""
        try:
            return self.model.solver.table(steps).evaluations
        except RowError as error:
            raise SettingsError(f"{self.name}: {error}; choose other --steps") from error

    @property
    def few_steps(self) -> int:
        """The smallest of FEW_STEPS that the scheduler accepts, or the largest if it accepts none of them."""
        for steps in FEW_STEPS:
            try:
                self.evaluations(steps)
            except SettingsError:
                continue
            return steps
        return FEW_STEPS[-1]


def load_subject(settings: BenchSettings) -> Subject:
    """Load the model, or build the architecture.

    Raises ModelError, and SettingsError, for example if the device is missing or has too little memory, or if the model
    runs in its diffusers pipeline.
    """
    device = detect_device(settings.model.device)
    run = RunSettings(TableSettings(()), ".", model=settings.model, compute=settings.compute)
    with explain_out_of_memory(settings.model, settings.compute):
        if settings.architecture is not None:
            return _build(settings.architecture, choose_compute(run, device))
        card = read_card(settings.model)
        if card.uses_pipeline_call:
            raise SettingsError(f"{card.name} runs in its diffusers pipeline: there is nothing to compare it with")
        compute = choose_compute(run, device, card=card)
        defaults = _defaults(card.sizes, card.guidance_scale, card.guidance_rescale, card.embedded_guidance)
        model = cast("LatentDiffusion", load_model(card, compute, with_checker=False))
        return Subject(card.title, model, compute, card.sizes, defaults)


def _build(name: str, compute: Compute) -> Subject:
    model, rules = build_architecture(name, *prepare_torch(compute))
    optimize_networks(model.networks, model.device, compiled=compute.compiled, threads=compute.threads)
    defaults = _defaults(rules.sizes, rules.guidance_scale, rules.guidance_rescale)
    return Subject(f"{name}, random weights", model, compute, rules.sizes, defaults)


def _defaults(sizes: SizeRules, *guidance: Any) -> SamplingParams:
    return SamplingParams(sizes.native_height, sizes.native_width, FEW_STEPS[0], *guidance)


def tune_batch_sizes(subject: Subject, sizes: Sequence[Size]) -> Compute:
    """Return `subject.compute` with the batch sizes that `--slots auto` measures for these image sizes.

    Raises torch.OutOfMemoryError if not even the smallest batch fits.
    """
    shapes = []
    for size in sizes:
        params = SamplingParams(*size, subject.few_steps, subject.defaults.guidance_scale, 0.0)
        plateau = find_plateau(subject.model, params)
        shapes.append(BatchShape(*size, plateau.slots, plateau.decode_batch))
    return subject.compute.with_shapes(shapes)
