"""Convert a diffusers scheduler to tables of coefficients. At each denoiser call, a row advances by one line of it.

The samples of most schedulers are linear in the initial noise, the model outputs and the noise that they draw. Running
such a scheduler once on basis vectors yields these linear maps for any solver (DDIM, PNDM, Heun, UniPC, Euler
ancestral, ...). diffusers remains the single source of truth, and this package implements no solver.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from batch_infer.errors import ModelError, RowError, first_line

TOLERANCE = 1e-4
"""Maximum difference between the samples of a table and its scheduler on random data, relative to the largest value.

It is checked at each evaluation, and allows for schedulers that compute in float32.
"""
CACHED_TABLES = 32
"""Maximum number of tables that a Solver caches, and of copies on the device that Slots caches.

A table for 1,000 steps takes 4 MB, 8 MB if the sampler draws noise at each step, and 24 MB if it also evaluates the
model twice per step.
"""
TRIAL_SHAPE = (1, 4, 4, 4)


class NotBatchableError(RowError):
    """The scheduler's steps are not a fixed linear map of the model outputs and the row's own noise."""


class Scheduler(Protocol):
    """The part of a diffusers scheduler that this module requires."""

    config: Any
    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None: ...
    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class CoefficientTable:
    """A sampler with K model evaluations, for one step count.

    y are the terms of a row's sums: first its unit noise, then for each evaluation k the model output (with guidance)
    and the `draws[k]` unit noises that the sampler draws. Evaluation k gets `input_scale[k] * x[k]` at `timesteps[k]`,
    with `x[0] = initial_scale * y[0]`. `x[k + 1]` is the sum of `coefficients[k, j] * y[j]` over the terms that are
    known by then: j up to `k + 1 + sum(draws[: k + 1])`.

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
    """Computes and caches the coefficient tables of one scheduler."""

    def __init__(self, scheduler: Scheduler, begin_index: int | None = None) -> None:
        """`begin_index`: the index that the pipeline sets before the first step. If None, the scheduler finds it.

        Raises ModelError if the scheduler is unusable, for example because it clips samples.
        """
        self.name = type(scheduler).__name__
        for option in ("clip_sample", "thresholding"):
            if getattr(scheduler.config, option, False):
                raise ModelError(
                    f"{self.name} with {option}=true is not supported: its steps are not linear. "
                    f"Set {option}=false, for example --scheduler {self.name}:{option}=false"
                )
        self._scheduler, self._begin_index = scheduler, begin_index
        self._tables: Callable[[int], CoefficientTable | RowError] = lru_cache(CACHED_TABLES)(self._make)
        self._probe()

    def table(self, num_inference_steps: int) -> CoefficientTable:
        """Return the table for a step count. Raises RowError if there is no valid table for that count."""
        table = self._tables(num_inference_steps)
        if isinstance(table, RowError):
            # Without this, the traceback of the cached error would grow with every row.
            raise table.with_traceback(None)
        return table

    def _probe(self) -> None:
        """Compute a table for the first step count that works. Raises ModelError if the scheduler is unusable."""
        refusals = []
        for steps in (10, 20, 4, 1):
            try:
                self.table(steps)
                return
            except NotBatchableError as error:
                raise ModelError(f"{error}; choose another with --scheduler") from error
            except RowError as error:
                refusals.append(str(error))
            except (TypeError, AttributeError, KeyError) as error:
                raise ModelError(f"{self.name} is not a scheduler for latent diffusion: {first_line(error)}") from error
        raise ModelError(f"{refusals[0]} (nor 20, 4 or 1); choose other settings with --scheduler")

    def _make(self, steps: int) -> CoefficientTable | RowError:
        """Compute a table and compare it with the scheduler on random data. Return a RowError if either fails."""
        refusal = f"{self.name} does not take num_inference_steps={steps}"
        try:
            terms, run = self._run_on_random_data(steps, seed=0, intercepts=True)
            intercepts = sum(run.draws) > 0
            _, other_run = self._run_on_random_data(steps, seed=1, intercepts=intercepts)
            table = _compute_table(self._copy_scheduler(steps), len(terms), intercepts=intercepts)
        except (ValueError, IndexError, ZeroDivisionError, RuntimeError, AssertionError) as error:
            return RowError(f"{refusal}: {first_line(error)}")
        except NotBatchableError as error:
            return NotBatchableError(f"{self.name} {error}")
        if not torch.isfinite(table.coefficients).all():
            return RowError(f"{refusal}: its steps are not finite")
        if not torch.equal(run.samples, other_run.samples):
            return NotBatchableError(
                f"{self.name} draws noise from a global generator, so an image would not depend only on its row's seed"
            )
        errors = (table.coefficients.double() @ terms - run.samples).abs().amax(dim=1)
        # Not any(errors > ...): a difference of NaN must not pass.
        if not (errors <= TOLERANCE * run.samples.abs().amax(dim=1)).all():
            return NotBatchableError(f"{self.name} with these settings is not linear in the model's outputs")
        return table

    def _copy_scheduler(self, steps: int) -> Scheduler:
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_timesteps(steps, device="cpu")
        if self._begin_index is not None and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self._begin_index)
        return scheduler

    def _run_on_random_data(self, steps: int, *, seed: int, intercepts: bool) -> tuple[torch.Tensor, _Run]:
        """Run the scheduler on fixed random terms and return them (count, elements) with the run.

        `seed` seeds torch's default generator, which must not affect the run.
        """
        generator = torch.Generator().manual_seed(0)
        terms: list[torch.Tensor] = []

        def supply() -> torch.Tensor:
            terms.append(torch.randn(TRIAL_SHAPE, generator=generator, dtype=torch.float64))
            return terms[-1]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            run = _run_scheduler(self._copy_scheduler(steps), supply, intercepts=intercepts)
        return torch.stack(terms).flatten(1), run


@dataclass(frozen=True, slots=True)
class _Run:
    """Input scale, number of draws and resulting sample of each evaluation. `samples` is (K, elements) float64."""

    input_scale: tuple[float, ...]
    draws: tuple[int, ...]
    samples: torch.Tensor


def _compute_table(scheduler: Scheduler, term_count: int, *, intercepts: bool) -> CoefficientTable:
    """Compute a table by running the scheduler on basis vectors, one for each term."""
    # Each basis vector is a sample with one channel per entry, because some solvers, such as UniPC, require rank 4.
    basis = list(torch.eye(term_count, dtype=torch.float64).reshape(term_count, 1, -1, 1, 1))
    timesteps = tuple(scheduler.timesteps.float().tolist())
    run = _run_scheduler(scheduler, lambda: basis.pop(0), intercepts=intercepts)
    return CoefficientTable(timesteps, run.input_scale, _initial_scale(scheduler), run.samples.float(), run.draws)


def _run_scheduler(scheduler: Scheduler, supply: Callable[[], torch.Tensor], *, intercepts: bool) -> _Run:
    """Run a scheduler. `supply` returns the initial noise, then for each evaluation the model output and the draws.

    Without `intercepts`, the scheduler draws the noise itself, which is twice as fast, and draws are not counted.
    """
    input_scale, draws, samples = [], [], []
    generator = torch.Generator()
    # Pass what pipelines pass if `step` takes it: the row's generator, and 0 as eta (the default of TCD differs).
    parameters = inspect.signature(scheduler.step).parameters
    arguments = {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in parameters}
    scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    sample = _initial_scale(scheduler) * supply()
    interception = _InterceptDraws(generator, supply)
    with interception if intercepts else nullcontext():
        for timestep in scheduler.timesteps.clone():
            # The scale is measured on ones, because the entries of a basis vector are mostly zero.
            input_scale.append(float(scale_model_input(torch.ones(1, 1, 1, 1, dtype=torch.float64), timestep)))
            count_before = interception.count
            sample = scheduler.step(supply(), timestep, sample, return_dict=False, **arguments)[0]
            draws.append(interception.count - count_before)
            samples.append(sample.double().flatten())
    return _Run(tuple(input_scale), tuple(draws), torch.stack(samples))


class _InterceptDraws(TorchFunctionMode):
    """Replaces noise drawn from one generator with supplied noise, and counts the draws."""

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
        # Slots can only draw unit noise in the shape of the latents.
        if func is not torch.randn:
            raise NotBatchableError("draws noise that is not normal")
        noise = self._supply()
        if noise.shape != torch.empty(*args, device="meta").shape:
            raise NotBatchableError("draws noise of another shape than its sample's")
        self.count += 1
        return noise.to(options.get("dtype") or torch.float32, copy=True)


def _initial_scale(scheduler: Scheduler) -> float:
    return float(getattr(scheduler, "init_noise_sigma", 1.0))
