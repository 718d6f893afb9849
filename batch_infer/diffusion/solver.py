"""A diffusers scheduler as a table of coefficients, so that every row can advance by its own line of its own table.

A scheduler is linear in the initial noise, in the model outputs it was handed and in the noise that it drew. Running it
once on basis vectors reads those linear maps off, whatever the solver (DDIM, PNDM, Heun, UniPC, Euler ancestral, ...):
diffusers stays the single source of truth, and no solver is written here.
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
"""How far a table may be from its scheduler on random data, at each step, relative to the step's largest value.

Some schedulers compute in float32.
"""
TABLES_KEPT = 32
"""Step counts whose tables are kept: of 1,000 steps one takes 4 MB, 8 where the sampler draws noise at each, and 24
where it asks the model twice besides."""
TRIAL_SHAPE = (1, 4, 4, 4)


class NotPackable(RowError):
    """The scheduler's steps are not a fixed linear map."""


class Scheduler(Protocol):
    """What is asked of a diffusers scheduler."""

    config: Any
    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None: ...
    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class CoefficientTable:
    """A sampler of K model evaluations, for one step count.

    y lists what a row adds up: first its unit noise, then for each evaluation k the model's output (guidance applied)
    and after it the `draws[k]` unit noises that the sampler draws. Evaluation k sees `input_scale[k] * x[k]` at
    `timesteps[k]`, where `x[0] = initial_scale * y[0]` and `x[k + 1]` is the sum of `coefficients[k, j] * y[j]` over
    all that is known by then: j up to `k + 1 + sum(draws[: k + 1])`.

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
    """The coefficient tables of one scheduler, made as step counts come up; the latest are kept."""

    def __init__(self, scheduler: Scheduler, begin_index: int | None = None) -> None:
        """`begin_index`: what the pipeline sets before its first step, None where it leaves that to the scheduler.

        Raises ModelError for a scheduler that clips, thresholds, or draws noise that is not its row's.
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
        self._tables: Callable[[int], CoefficientTable | RowError] = lru_cache(TABLES_KEPT)(self._make)
        self._probe()

    def table(self, num_inference_steps: int) -> CoefficientTable:
        """The table for a step count. Raises RowError where the scheduler refuses that count."""
        found = self._tables(num_inference_steps)
        if isinstance(found, RowError):
            # Without its traceback, which would grow by every row that asks.
            raise found.with_traceback(None)
        return found

    def _probe(self) -> None:
        """Find out at once, before any row is rendered, whether the scheduler can be packed at all."""
        refusals = []
        for steps in (10, 20, 4, 1):
            try:
                self.table(steps)
            except NotPackable as error:
                raise ModelError(f"{error}; choose another with --scheduler") from error
            except RowError as error:
                refusals.append(str(error))
                continue
            except (TypeError, AttributeError, KeyError) as error:
                raise ModelError(f"{self.name} is not a scheduler for latent diffusion: {first_line(error)}") from error
            return
        raise ModelError(f"{refusals[0]} (nor 20, 4 or 1); choose other settings with --scheduler")

    def _make(self, steps: int) -> CoefficientTable | RowError:
        """The table, or why there is none."""
        refusal = f"{self.name} does not take num_inference_steps={steps}"
        try:
            first = self._try_out(steps, seed=0, watched=True)
            second = self._try_out(steps, seed=1, watched=first.draws > 0)
            table = _read_off(self._fresh(steps), len(first.known), watched=first.draws > 0)
        except (ValueError, IndexError, ZeroDivisionError, RuntimeError, AssertionError) as error:
            return RowError(f"{refusal}: {first_line(error)}")
        except NotPackable as error:
            return NotPackable(f"{self.name} {error}")
        if not torch.isfinite(table.coefficients).all():
            return RowError(f"{refusal}: its steps are not finite")
        if not torch.equal(first.samples, second.samples):
            return NotPackable(
                f"{self.name} draws noise of its own, so an image would not depend on its row's seed alone"
            )
        errors = (table.coefficients.double() @ first.known - first.samples).abs().amax(dim=1)
        # Not any(errors > ...): a difference that is not a number must not pass.
        if not (errors <= TOLERANCE * first.samples.abs().amax(dim=1)).all():
            return NotPackable(f"{self.name} with these settings is not linear in the model's outputs")
        return table

    def _fresh(self, steps: int) -> Scheduler:
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_timesteps(steps, device="cpu")
        if self._begin_index is not None and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self._begin_index)
        return scheduler

    def _try_out(self, steps: int, *, seed: int, watched: bool) -> _Trial:
        """The scheduler itself on random outputs and draws, always the same, with torch's own generator at `seed`."""
        generator = torch.Generator().manual_seed(0)
        known: list[torch.Tensor] = []

        def supply() -> torch.Tensor:
            known.append(torch.randn(TRIAL_SHAPE, generator=generator, dtype=torch.float64))
            return known[-1]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            walked = _walk(self._fresh(steps), supply, watched=watched)
        samples = torch.stack([step.sample for step in walked])
        return _Trial(torch.stack(known).flatten(1), samples, sum(step.draws for step in walked))


@dataclass(frozen=True, slots=True)
class _Trial:
    """Inputs of a scheduler, (number, elements), its sample after each step, (steps, elements), and its draws."""

    known: torch.Tensor
    samples: torch.Tensor
    draws: int


@dataclass(frozen=True, slots=True)
class _Step:
    """What one evaluation told: the scale of its input, the draws after it, and the sample, flat, that came of it."""

    input_scale: float
    draws: int
    sample: torch.Tensor


def _read_off(scheduler: Scheduler, known: int, *, watched: bool) -> CoefficientTable:
    """Run the scheduler on basis vectors, as many as it will be handed."""
    # Some solvers want rank 4 (UniPC); the basis lies along the channels.
    basis = torch.eye(known, dtype=torch.float64).reshape(known, 1, -1, 1, 1)
    timesteps = tuple(scheduler.timesteps.float().tolist())
    numbers = count()
    steps = _walk(scheduler, lambda: basis[next(numbers)], watched=watched)
    return CoefficientTable(
        timesteps=timesteps,
        input_scale=tuple(step.input_scale for step in steps),
        initial_scale=_initial(scheduler),
        coefficients=torch.stack([step.sample for step in steps]).float(),
        draws=tuple(step.draws for step in steps),
    )


def _walk(scheduler: Scheduler, supply: Callable[[], torch.Tensor], *, watched: bool) -> list[_Step]:
    """Run a scheduler on what `supply` gives for the noise, for each model output and for each draw, in that order.

    Unwatched, which is twice as fast, draws are left to the scheduler.
    """
    steps = []
    generator = torch.Generator()
    # As pipelines call it: the row's generator where the scheduler takes one, and eta, where there is one, as it is
    # there by default (TCD's own default is another).
    offered = {"generator": generator, "eta": 0.0}
    taken = inspect.signature(scheduler.step).parameters
    arguments = {name: value for name, value in offered.items() if name in taken}
    sample = _initial(scheduler) * supply()
    draws = _Draws(generator, supply)
    with draws if watched else nullcontext():
        for timestep in scheduler.timesteps.clone():
            # The scale is read off ones: in a basis the sample's own entries are mostly zero.
            scale = float(_scale(scheduler, timestep, torch.ones(1, 1, 1, 1, dtype=torch.float64)))
            before = draws.count
            sample = scheduler.step(supply(), timestep, sample, return_dict=False, **arguments)[0]
            steps.append(_Step(scale, draws.count - before, sample.double().flatten()))
    return steps


class _Draws(TorchFunctionMode):
    """Answers by a supply what is drawn from one generator, and counts it."""

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
        # What the packer will do is to draw one unit noise in the latents' shape.
        if func is not torch.randn:
            raise NotPackable("draws noise that is not normal")
        drawn = self._supply()
        if drawn.shape != torch.empty(*args, device="meta").shape:
            raise NotPackable("draws noise of another shape than its sample's")
        self.count += 1
        return drawn.to(options.get("dtype") or torch.float32, copy=True)


def _scale(scheduler: Scheduler, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def _initial(scheduler: Scheduler) -> float:
    return float(getattr(scheduler, "init_noise_sigma", 1.0))
