"""What is benchmarked: a model on its device, and how it computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from batch_infer.autotune import explain_out_of_memory, find_device, find_plateau
from batch_infer.bench.rows import Sampling
from batch_infer.bench.settings import BenchSettings, Size
from batch_infer.errors import RowError, SettingsError
from batch_infer.jobs import choose_compute
from batch_infer.models import ModelCard, build_architecture, read_card, speed_up
from batch_infer.records import SamplingParams, SizeRules
from batch_infer.settings import BatchShape, Compute, RunSettings, TableSettings
from batch_infer.worker import load_model, prepare_torch

if TYPE_CHECKING:
    from batch_infer.models import Family

FEW_STEPS = (1, 2, 4, 10, 20)


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model, which every contender shares."""

    name: str
    model: Family
    compute: Compute
    sizes: SizeRules
    sampling: Sampling

    def evaluations(self, steps: int) -> int:
        """How often a row of so many steps asks the model. Raises SettingsError where the scheduler refuses them."""
        try:
            return self.model.solver.table(steps).evaluations
        except RowError as error:
            raise SettingsError(f"{self.name}: {error}; choose other --steps") from error

    @property
    def few_steps(self) -> int:
        """A small number of steps that the scheduler takes."""
        for steps in FEW_STEPS:
            try:
                self.evaluations(steps)
            except SettingsError:
                continue
            return steps
        return FEW_STEPS[-1]


def load_subject(settings: BenchSettings) -> Subject:
    """Raises ModelError, and SettingsError where the device is not there or too small."""
    device = find_device(settings.model.device)
    run = RunSettings(TableSettings(()), Path(), model=settings.model, compute=settings.compute)
    try:
        if settings.architecture is not None:
            return _built(settings.architecture, choose_compute(run, device))
        card = read_card(settings.model)
        return _loaded(card, choose_compute(run, device, card=card))
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory(error) from error


def _loaded(card: ModelCard, compute: Compute) -> Subject:
    if card.driven:
        raise SettingsError(f"{card.name} is driven by diffusers' own pipeline: there is nothing to compare it with")
    model = load_model(card, compute, with_checker=False)
    sampling = Sampling(card.guidance_scale, card.guidance_rescale, card.embedded_guidance)
    return Subject(card.name, model, compute, card.sizes, sampling)


def _built(name: str, compute: Compute) -> Subject:
    built = build_architecture(name, *prepare_torch(compute))
    speed_up(built.model.networks, built.model.device, compiled=compute.compiled, threads=compute.threads)
    sampling = Sampling(built.guidance_scale, built.guidance_rescale)
    return Subject(f"{name}, random weights", built.model, compute, built.sizes, sampling)


def best_shapes(subject: Subject, sizes: tuple[Size, ...]) -> Compute:
    """What `--slots auto` stands for here."""
    shapes = []
    for size in sizes:
        params = SamplingParams(*size, subject.few_steps, subject.sampling.guidance_scale, 0.0)
        knee = find_plateau(subject.model, params)
        shapes.append(BatchShape(*size, knee.slots, knee.decode_batch))
    return subject.compute.with_shapes(shapes)
