"""The solver: a scheduler as a table, against the scheduler itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from batch_infer.diffusion import CoefficientTable, Solver
from batch_infer.errors import ModelError, RowError
from batch_infer.settings import SchedulerSpec
from tests.checkpoints import NOISE_SCHEDULE

SHAPE = (1, 4, 4, 4)
SPECS = (
    "DDIMScheduler:clip_sample=false",
    "DDIMScheduler:clip_sample=false,prediction_type=v_prediction,timestep_spacing=trailing,rescale_betas_zero_snr=true",
    "PNDMScheduler:skip_prk_steps=true",
    "PNDMScheduler:skip_prk_steps=false",
    "EulerDiscreteScheduler",
    "EulerDiscreteScheduler:use_karras_sigmas=true",
    "EulerDiscreteScheduler:prediction_type=v_prediction",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepScheduler:solver_order=3",
    "DPMSolverMultistepScheduler:use_lu_lambdas=true",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler:solver_order=3",
    "DEISMultistepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "IPNDMScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


def make_scheduler(text: str) -> Any:
    spec = SchedulerSpec.parse(text)
    return getattr(diffusers, spec.name).from_config(NOISE_SCHEDULE, **dict(spec.options))


def model(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """A stand-in for a UNet: curved in the sample, and another one at every timestep."""
    return torch.tanh(sample * (1 + timestep / 1000)) + 0.1 * torch.cos(sample.flip(-1) * 3)


def by_scheduler(scheduler: Any, steps: int, noise: torch.Tensor) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    sample = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(model(scaled, float(timestep)), timestep, sample, return_dict=False)[0]
    return sample


def by_table(table: CoefficientTable, noise: torch.Tensor) -> torch.Tensor:
    known, sample = [noise.flatten()], table.initial_scale * noise
    for k in range(table.evaluations):
        known.append(model(table.input_scale[k] * sample, table.timesteps[k]).flatten())
        sample = (table.coefficients[k, : k + 2].double() @ torch.stack(known)).reshape(SHAPE)
    return sample


@pytest.mark.parametrize("steps", [4, 11, 30])
@pytest.mark.parametrize("text", SPECS)
def test_table_walks_as_the_scheduler_does(text: str, steps: int) -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    wanted = by_scheduler(make_scheduler(text), steps, noise)
    found = by_table(Solver(make_scheduler(text)).table(steps), noise)
    assert torch.allclose(found, wanted.double(), rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("text", "evaluations"), [("DDIMScheduler:clip_sample=false", 10), ("HeunDiscreteScheduler", 19)]
)
def test_evaluations_are_counted_by_the_timesteps(text: str, evaluations: int) -> None:
    table = Solver(make_scheduler(text)).table(10)
    assert table.evaluations == len(table.timesteps) == len(table.input_scale) == evaluations
    assert table.coefficients.shape == (evaluations, evaluations + 1)
    assert table.coefficients.dtype == torch.float32
    assert not table.coefficients.triu(2).any()  # no step knows outputs that are still to come


def test_a_table_is_made_once_and_leaves_scheduler_and_random_state_alone() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    before = torch.random.get_rng_state()
    solver = Solver(scheduler)
    assert solver.table(7) is solver.table(7)
    assert scheduler.num_inference_steps is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_refused_step_count_is_the_rows_fault_each_time() -> None:
    solver = Solver(PNDMScheduler(skip_prk_steps=False))
    assert solver.table(4).evaluations > 4
    frames = set()
    for _ in range(3):
        with pytest.raises(RowError, match="PNDMScheduler does not take num_inference_steps=3") as refusal:
            solver.table(3)
        frames.add(len(refusal.traceback))
    assert len(frames) == 1  # the kept error does not grow with the rows that meet it
    with pytest.raises(RowError, match="num_inference_steps=1001"):
        Solver(DDIMScheduler(clip_sample=False)).table(1001)


def test_a_scheduler_that_takes_no_count_says_why() -> None:
    with pytest.raises(ModelError, match="prediction_type given as nonsense.*--scheduler"):
        Solver(make_scheduler("EulerDiscreteScheduler:prediction_type=nonsense"))


class Stub:
    """A scheduler of one rule."""

    config = SimpleNamespace()
    init_noise_sigma = 1.0

    def __init__(self, rule: Any) -> None:
        self._rule = rule

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        self.timesteps = torch.arange(steps, 0, -1)

    def step(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool) -> Any:
        return (self._rule(output, sample),)


def test_rules_that_are_no_fixed_linear_map_are_refused() -> None:
    assert Solver(Stub(lambda output, sample: sample - 0.1 * output)).table(3).coefficients[2, 0] == 1
    with pytest.raises(ModelError, match="not linear in the model's outputs"):
        Solver(Stub(lambda output, sample: sample - output.clamp(-1, 1)))
    with pytest.raises(ModelError, match="draws noise at every step"):
        Solver(Stub(lambda output, sample: sample - output + 0.1 * torch.randn(sample.shape)))
    with pytest.raises(ModelError, match="not finite"):
        Solver(Stub(lambda output, sample: sample - output / 0.0))
    with pytest.raises(ModelError, match="not a scheduler for latent diffusion"):
        Solver(Stub(lambda output: output))
