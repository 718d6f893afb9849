"""A diffusers scheduler as a table of coefficients, so that every row can advance by its own line of its own table.

A deterministic scheduler is linear in the initial noise and in the model outputs it was handed. Running it once on
basis vectors reads those linear maps off, whatever the solver (DDIM, PNDM, Heun, UniPC, ...): diffusers stays the
single source of truth, and no solver is written here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from batch_infer.errors import ModelError, RowError, first_line

TOLERANCE = 1e-4
"""How far, relative to the largest value, a table may be from its scheduler on random data (float32 inside some)."""


class NotPackable(RowError):
    """The scheduler's steps are not a fixed linear map."""


class Scheduler(Protocol):
    """What is asked of a diffusers scheduler."""

    config: Any
    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None: ...
    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class CoefficientTable:
    """A sampler of K model evaluations, for one step count.

    With y[0] the unit noise and y[k + 1] the k-th model output (guidance applied), evaluation k sees
    `input_scale[k] * x[k]` at `timesteps[k]`, where `x[0] = initial_scale * y[0]` and
    `x[k + 1] = sum(coefficients[k, j] * y[j] for j in range(k + 2))`.

    timesteps and input_scale have K entries; coefficients is (K, K + 1) float32 on the CPU.
    """

    timesteps: tuple[float, ...]
    input_scale: tuple[float, ...]
    initial_scale: float
    coefficients: torch.Tensor

    @property
    def evaluations(self) -> int:
        return len(self.timesteps)


class Solver:
    """The coefficient tables of one scheduler, made as step counts come up."""

    def __init__(self, scheduler: Scheduler) -> None:
        """Raises ModelError for a scheduler that clips, thresholds or draws noise: such steps are not linear."""
        self.name = type(scheduler).__name__
        for option in ("clip_sample", "thresholding"):
            if getattr(scheduler.config, option, False):
                raise ModelError(
                    f"{self.name} with {option}=true cannot be packed: its steps are not linear. "
                    f"Set {option}=false, for example --scheduler {self.name}:{option}=false"
                )
        self._scheduler = scheduler
        self._tables: dict[int, CoefficientTable | RowError] = {}
        self._probe()

    def table(self, num_inference_steps: int) -> CoefficientTable:
        """The table for a step count. Raises RowError where the scheduler refuses that count."""
        if num_inference_steps not in self._tables:
            try:
                self._tables[num_inference_steps] = self._make(num_inference_steps)
            except RowError as error:
                self._tables[num_inference_steps] = error
        found = self._tables[num_inference_steps]
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

    def _make(self, steps: int) -> CoefficientTable:
        try:
            table = _read_off(self._fresh(steps))
        except (ValueError, IndexError, ZeroDivisionError, RuntimeError, AssertionError) as error:
            raise RowError(f"{self.name} does not take num_inference_steps={steps}: {first_line(error)}") from error
        if not torch.isfinite(table.coefficients).all():
            raise RowError(f"{self.name} does not take num_inference_steps={steps}: its steps are not finite")
        self._check(table, steps)
        return table

    def _fresh(self, steps: int) -> Scheduler:
        scheduler = copy.deepcopy(self._scheduler)
        scheduler.set_timesteps(steps, device="cpu")
        return scheduler

    def _check(self, table: CoefficientTable, steps: int) -> None:
        """Compare the table once with the scheduler itself, on random data and under two random states."""
        noise = torch.Generator().manual_seed(0)
        outputs = torch.randn(table.evaluations + 1, 64, generator=noise, dtype=torch.float64)
        first, second = (_run(self._fresh(steps), outputs, seed) for seed in (0, 1))
        if not torch.equal(first, second):
            raise NotPackable(
                f"{self.name} draws noise at every step, so an image would not depend on its row's seed alone"
            )
        from_table = table.coefficients[-1].double() @ outputs
        if not torch.allclose(from_table, first, rtol=0, atol=TOLERANCE * float(first.abs().max())):
            raise NotPackable(f"{self.name} with these settings is not linear in the model's outputs")


def _scale(scheduler: Scheduler, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def _initial(scheduler: Scheduler) -> float:
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def _read_off(scheduler: Scheduler) -> CoefficientTable:
    """Run the scheduler on basis vectors: coordinate 0 is the noise, coordinate k + 1 the k-th model output."""
    timesteps = scheduler.timesteps.clone()
    evaluations = len(timesteps)
    # Some solvers want rank 4 (UniPC); the basis lies along the channels.
    basis = torch.eye(evaluations + 1, dtype=torch.float64).reshape(evaluations + 1, 1, -1, 1, 1)
    sample = _initial(scheduler) * basis[0]
    input_scale, rows = [], []
    for k, timestep in enumerate(timesteps):
        # The scale is read off ones: the sample's own entries are mostly zero.
        input_scale.append(float(_scale(scheduler, timestep, torch.ones(1, 1, 1, 1, dtype=torch.float64))))
        sample = scheduler.step(basis[k + 1], timestep, sample, return_dict=False)[0]
        rows.append(sample.double().flatten())
    return CoefficientTable(
        timesteps=tuple(timesteps.float().tolist()),
        input_scale=tuple(input_scale),
        initial_scale=_initial(scheduler),
        coefficients=torch.stack(rows).float(),
    )


def _run(scheduler: Scheduler, outputs: torch.Tensor, seed: int) -> torch.Tensor:
    """The scheduler itself on given noise `outputs[0]` and model outputs `outputs[1:]`: the last sample."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sample = _initial(scheduler) * outputs[0].reshape(1, 4, 4, 4)
        for timestep, output in zip(scheduler.timesteps, outputs[1:], strict=True):
            _scale(scheduler, timestep, sample)
            sample = scheduler.step(output.reshape(1, 4, 4, 4), timestep, sample, return_dict=False)[0]
    return sample.double().flatten()
