"""A diffusers scheduler as a table of coefficients, so that each row advances by one line of its own table.

A scheduler is linear in the initial noise, in the model outputs and in the noise that it draws. Running it once on
basis vectors gives these linear maps for any solver (DDIM, PNDM, Heun, UniPC, Euler ancestral, ...): diffusers stays
the single source of truth, and no solver is written here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from batch_infer.errors import ModelError, RowError, first_line

TOLERANCE = 1e-4
"""Largest difference of a table from its scheduler on random data, at each step, relative to its largest value.

Some schedulers compute in float32.
"""
CACHED_TABLES = 32
"""Step counts whose tables are cached. A table of 1,000 steps takes 4 MB, 8 MB if the sampler draws noise at each step,
and 24 MB if it also evaluates the model twice per step."""
TRIAL_SHAPE = (1, 4, 4, 4)


class NotBatchableError(RowError):
    """The scheduler's steps are not a fixed linear map."""


class Scheduler(Protocol):
    """The part of a diffusers scheduler that is used here."""

    config: Any
    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None: ...
    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class CoefficientTable:
    """A sampler of K model evaluations, for one step count.

    y are the terms of a row's sums: first its unit noise, then for each evaluation k the model output (with guidance),
    followed by the `draws[k]` unit noises that the sampler draws. Evaluation k gets `input_scale[k] * x[k]` at
    `timesteps[k]`, where `x[0] = initial_scale * y[0]` and `x[k + 1]` is the sum of `coefficients[k, j] * y[j]` over
    the terms known by then: j up to `k + 1 + sum(draws[: k + 1])`.

    timesteps, input_scale and draws have K entries; coefficients is (K, 1 + K + sum(draws)) float32 on the CPU.
    """

    timesteps: tuple[float, ...]
    input_scale: tuple[float, ...]
    initial_scale: float
    coefficients: torch.Tensor
    draws: tuple[int, ...]

    @property
    def evaluations(self) -> int:
        return len(self.timesteps)


class Solver:
    """The coefficient tables of one scheduler, computed on demand. The latest ones are cached."""

    def __init__(self, scheduler: Scheduler, begin_index: int | None = None) -> None:
        """`begin_index`: set before the first step if the pipeline does so, None if the scheduler finds it.

        Raises ModelError for a scheduler that clips, thresholds, or draws noise from another generator than its row's.
        """
        self.name = type(scheduler).__name__
        for option in ("clip_sample", "thresholding"):
            if getattr(scheduler.config, option, False):
                raise ModelError(
                    f"{self.name} with {option}=true cannot be packed: its steps are not linear. "
                    f"Set {option}=false, for example --scheduler {self.name}:{option}=false"
                )
        self._scheduler = scheduler
        self._begin_index = begin_index
        self._tables: Callable[[int], CoefficientTable | RowError] = lru_cache(CACHED_TABLES)(self._make)
        self._probe()

    def table(self, num_inference_steps: int) -> CoefficientTable:
        """Return the table for a step count. Raises RowError if the scheduler refuses that count."""
        table = self._tables(num_inference_steps)
        if isinstance(table, RowError):
            # Without the traceback, which would grow with every row.
            raise table.with_traceback(None)
        return table

    def _probe(self) -> None:
        """Raise ModelError if the scheduler can be used for no step count, before any row is rendered."""
        refusals = []
        for steps in (10, 20, 4, 1):
            try:
                self.table(steps)
            except NotBatchableError as error:
                raise ModelError(f"{error}; choose another with --scheduler") from error
            except RowError as error:
                refusals.append(str(error))
                continue
            except (TypeError, AttributeError, KeyError) as error:
                raise ModelError(f"{self.name} is not a scheduler for latent diffusion: {first_line(error)}") from error
            return
        raise ModelError(f"{refusals[0]} (nor 20, 4 or 1); choose other settings with --scheduler")

    def _make(self, steps: int) -> CoefficientTable | RowError:
        """Return the table, or the reason why there is none."""
        refusal = f"{self.name} does not take num_inference_steps={steps}"
        try:
            first = self._run_on_random_data(steps, seed=0, intercepts=True)
            intercepts = first.draws > 0
            second = self._run_on_random_data(steps, seed=1, intercepts=intercepts)
            table = _compute_table(self._copy_scheduler(steps), len(first.known), intercepts=intercepts)
        except (ValueError, IndexError, ZeroDivisionError, RuntimeError, AssertionError) as error:
            return RowError(f"{refusal}: {first_line(error)}")
        except NotBatchableError as error:
            return NotBatchableError(f"{self.name} {error}")
        if not torch.isfinite(table.coefficients).all():
            return RowError(f"{refusal}: its steps are not finite")
        if not torch.equal(first.samples, second.samples):
            return NotBatchableError(
                f"{self.name} draws noise from a global generator, so an image would not depend only on its row's seed"
            )
        errors = (table.coefficients.double() @ first.known - first.samples).abs().amax(dim=1)
        # Not any(errors > ...): a difference of nan must not pass.
        if not (errors <= TOLERANCE * first.samples.abs().amax(dim=1)).all():
            return NotBatchableError(f"{self.name} with these settings is not linear in the model's outputs")
        return table

    def _copy_scheduler(self, steps: int) -> Scheduler:
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_timesteps(steps, device="cpu")
        if self._begin_index is not None and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self._begin_index)
        return scheduler

    def _run_on_random_data(self, steps: int, *, seed: int, intercepts: bool) -> _Trial:
        """Run the scheduler on fixed random outputs and draws, with torch's default generator seeded with `seed`."""
        generator = torch.Generator().manual_seed(0)
        known: list[torch.Tensor] = []

        def supply() -> torch.Tensor:
            known.append(torch.randn(TRIAL_SHAPE, generator=generator, dtype=torch.float64))
            return known[-1]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            steps_taken = _run_scheduler(self._copy_scheduler(steps), supply, intercepts=intercepts)
        samples = torch.stack([step.sample for step in steps_taken])
        return _Trial(torch.stack(known).flatten(1), samples, sum(step.draws for step in steps_taken))


@dataclass(frozen=True, slots=True)
class _Trial:
    """Inputs of a scheduler (count, elements), its sample after each step (steps, elements), and how often it drew."""

    known: torch.Tensor
    samples: torch.Tensor
    draws: int


@dataclass(frozen=True, slots=True)
class _Step:
    """One evaluation: the scale of its input, the number of draws after it, and the resulting sample, flattened."""

    input_scale: float
    draws: int
    sample: torch.Tensor


def _compute_table(scheduler: Scheduler, known: int, *, intercepts: bool) -> CoefficientTable:
    """Run the scheduler on `known` basis vectors, one for each of its inputs."""
    # Some solvers require rank 4 (UniPC). The basis is along the channels.
    basis = torch.eye(known, dtype=torch.float64).reshape(known, 1, -1, 1, 1)
    timesteps = tuple(scheduler.timesteps.float().tolist())
    numbers = count()
    steps = _run_scheduler(scheduler, lambda: basis[next(numbers)], intercepts=intercepts)
    return CoefficientTable(
        timesteps=timesteps,
        input_scale=tuple(step.input_scale for step in steps),
        initial_scale=_initial(scheduler),
        coefficients=torch.stack([step.sample for step in steps]).float(),
        draws=tuple(step.draws for step in steps),
    )


def _run_scheduler(scheduler: Scheduler, supply: Callable[[], torch.Tensor], *, intercepts: bool) -> list[_Step]:
    """Run a scheduler with `supply` called for the noise, for each model output and for each draw, in this order.

    Without `intercepts`, which is twice as fast, the scheduler draws noise itself.
    """
    steps = []
    generator = torch.Generator()
    # As pipelines call it: with the row's generator, and with the pipelines' default of eta (TCD's own differs), if the
    # scheduler has these arguments.
    parameters = inspect.signature(scheduler.step).parameters
    arguments = {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in parameters}
    sample = _initial(scheduler) * supply()
    draws = _InterceptDraws(generator, supply)
    with draws if intercepts else nullcontext():
        for timestep in scheduler.timesteps.clone():
            # The scale is measured on ones: the entries of a basis vector are mostly zero.
            scale = float(_scale(scheduler, timestep, torch.ones(1, 1, 1, 1, dtype=torch.float64)))
            before = draws.count
            sample = scheduler.step(supply(), timestep, sample, return_dict=False, **arguments)[0]
            steps.append(_Step(scale, draws.count - before, sample.double().flatten()))
    return steps


class _InterceptDraws(TorchFunctionMode):
    """Replaces what is drawn from one generator by supplied noise, and counts the draws."""

    def __init__(self, generator: torch.Generator, supply: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.count = 0
        self._generator, self._supply = generator, supply

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if options.get("generator") is not self._generator:
            return func(*args, **options)
        # The packer draws unit noise in the shape of the latents.
        if func is not torch.randn:
            raise NotBatchableError("draws noise that is not normal")
        drawn = self._supply()
        if drawn.shape != torch.empty(*args, device="meta").shape:
            raise NotBatchableError("draws noise of another shape than its sample's")
        self.count += 1
        return drawn.to(options.get("dtype") or torch.float32, copy=True)


def _scale(scheduler: Scheduler, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def _initial(scheduler: Scheduler) -> float:
    return float(getattr(scheduler, "init_noise_sigma", 1.0))
