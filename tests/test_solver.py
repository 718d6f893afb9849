"""The coefficient table of a scheduler gives the same samples as the scheduler itself."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline

from batch_infer.diffusion import CoefficientTable, Solver
from batch_infer.diffusion.solver import CACHED_TABLES
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
    "TCDScheduler",
)
DRAWING = (
    "EulerAncestralDiscreteScheduler",
    "EulerAncestralDiscreteScheduler:prediction_type=v_prediction,timestep_spacing=trailing",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++",
    "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++,solver_order=3,use_karras_sigmas=true",
    "DPMSolverSinglestepScheduler:algorithm_type=sde-dpmsolver++",
    "SASolverScheduler",
    "SASolverScheduler:predictor_order=3,corrector_order=4",
    "LCMScheduler",
    "DDPMScheduler:clip_sample=false",
    "DDPMScheduler:clip_sample=false,variance_type=fixed_large,timestep_spacing=trailing",
)


def make_scheduler(text: str) -> Any:
    spec = SchedulerSpec.parse(text)
    return getattr(diffusers, spec.name).from_config(NOISE_SCHEDULE, **dict(spec.options))


def model(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Stand in for a UNet with outputs that are not linear in the sample and differ at every timestep."""
    return torch.tanh(sample * (1 + timestep / 1000)) + 0.1 * torch.cos(sample.flip(-1) * 3)


def sample_with_scheduler(scheduler: Any, steps: int, seed: int) -> torch.Tensor:
    """Run the scheduler's own loop as a pipeline does: in float32, the dtype of its draws."""
    pipe = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(seed)
    arguments = pipe.prepare_extra_step_kwargs(generator, eta=0.0)
    scheduler.set_timesteps(steps)
    sample = torch.randn(SHAPE, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(model(scaled, float(timestep)), timestep, sample, **arguments, return_dict=False)[0]
    return sample


def sample_with_table(table: CoefficientTable, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    terms = [torch.randn(SHAPE, generator=generator)]
    sample = table.initial_scale * terms[0]
    for k in range(table.evaluations):
        terms.append(model(table.input_scale[k] * sample, table.timesteps[k]))
        terms += [torch.randn(SHAPE, generator=generator) for _ in range(table.draws[k])]
        sample = (table.coefficients[k, : len(terms)] @ torch.stack(terms).flatten(1)).reshape(SHAPE)
    assert len(terms) == table.coefficients.shape[1]
    return sample


@pytest.mark.parametrize("steps", [4, 11, 30])
@pytest.mark.parametrize("text", [*SPECS, *DRAWING])
def test_a_table_gives_the_samples_of_its_scheduler(text: str, steps: int) -> None:
    expected = sample_with_scheduler(make_scheduler(text), steps, seed=steps)
    actual = sample_with_table(Solver(make_scheduler(text)).table(steps), seed=steps)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("text", "draws"),
    [
        ("EulerDiscreteScheduler", (0, 0, 0, 0)),
        ("TCDScheduler", (0, 0, 0, 0)),  # the default of eta is 0 in pipelines and 0.3 in the scheduler
        ("EulerAncestralDiscreteScheduler", (1, 1, 1, 1)),
        ("LCMScheduler", (1, 1, 1, 0)),
        ("KDPM2AncestralDiscreteScheduler", (0, 1, 0, 1, 0, 1, 0)),
    ],
)
def test_draws_are_counted_per_evaluation(text: str, draws: tuple[int, ...]) -> None:
    assert Solver(make_scheduler(text)).table(4).draws == draws


@pytest.mark.parametrize(
    ("text", "evaluations"), [("DDIMScheduler:clip_sample=false", 10), ("HeunDiscreteScheduler", 19)]
)
def test_there_is_one_evaluation_per_timestep(text: str, evaluations: int) -> None:
    table = Solver(make_scheduler(text)).table(10)
    assert table.evaluations == len(table.timesteps) == len(table.input_scale) == evaluations
    assert table.coefficients.shape == (evaluations, evaluations + 1)
    assert table.coefficients.dtype == torch.float32
    assert not table.coefficients.triu(2).any()  # no step uses later outputs


def test_a_table_is_computed_once_and_changes_neither_scheduler_nor_random_state() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    before = torch.random.get_rng_state()
    solver = Solver(scheduler)
    table = solver.table(7)
    assert solver.table(7) is table
    assert scheduler.num_inference_steps is None
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_latest_tables_are_cached_and_an_older_one_is_computed_again() -> None:
    solver = Solver(EulerAncestralDiscreteScheduler())
    first, freed = solver.table(3), weakref.ref(solver.table(3).coefficients)
    values = first.coefficients.clone()
    for steps in range(10, 10 + CACHED_TABLES):
        solver.table(steps)
    assert solver.table(10) is solver.table(10)
    del first
    assert freed() is None
    assert torch.equal(solver.table(3).coefficients, values)


def test_a_begin_index_is_set_as_in_some_pipelines() -> None:
    """If two steps have the same timestep, the scheduler's own search does not find the first."""
    scheduler = make_scheduler("DPMSolverMultistepScheduler:use_beta_sigmas=true,num_train_timesteps=100")
    with pytest.raises(RowError, match="num_inference_steps=50"):
        Solver(scheduler).table(50)
    assert Solver(scheduler, begin_index=0).table(50).evaluations == 50


def test_a_rejected_step_count_raises_a_row_error_each_time() -> None:
    solver = Solver(PNDMScheduler(skip_prk_steps=False))
    assert solver.table(4).evaluations > 4
    frames = set()
    for _ in range(3):
        with pytest.raises(RowError, match="PNDMScheduler does not take num_inference_steps=3") as exc_info:
            solver.table(3)
        frames.add(len(exc_info.traceback))
    assert len(frames) == 1  # the traceback of the cached error does not grow
    with pytest.raises(RowError, match="num_inference_steps=1001"):
        Solver(DDIMScheduler(clip_sample=False)).table(1001)


def test_a_scheduler_that_rejects_every_step_count_is_rejected_with_its_reason() -> None:
    with pytest.raises(ModelError, match="prediction_type given as nonsense.*--scheduler"):
        Solver(make_scheduler("EulerDiscreteScheduler:prediction_type=nonsense"))


class Stub:
    """A scheduler whose step is a function."""

    config: Any = SimpleNamespace()
    init_noise_sigma = 1.0
    timesteps: torch.Tensor

    def __init__(self, rule: Any) -> None:
        self._rule = rule

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.timesteps = torch.arange(num_inference_steps, 0, -1)

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        return (self._rule(model_output, sample),)


class DrawingStub(Stub):
    """A scheduler whose step is a function that takes a generator."""

    def step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, generator: Any = None, **kwargs: Any
    ) -> Any:
        return (self._rule(model_output, sample, generator),)


class TwoStates(Stub):
    """A scheduler whose first step is not linear and whose last step drops the sample."""

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        return (model_output * model_output if timestep > 1 else model_output,)


def test_every_step_is_compared_and_not_only_the_last() -> None:
    with pytest.raises(ModelError, match="TwoStates with these settings is not linear"):
        Solver(TwoStates(None))


def test_steps_that_are_not_a_fixed_linear_map_are_rejected() -> None:
    assert Solver(Stub(lambda output, sample: sample - 0.1 * output)).table(3).coefficients[2, 0] == 1
    with pytest.raises(ModelError, match="not linear in the model's outputs"):
        Solver(Stub(lambda output, sample: sample - output.clamp(-1, 1)))
    with pytest.raises(ModelError, match="draws noise from a global generator"):
        Solver(Stub(lambda output, sample: sample - output + 0.1 * torch.randn(sample.shape)))
    with pytest.raises(ModelError, match="not finite"):
        Solver(Stub(lambda output, sample: sample - output / 0.0))
    with pytest.raises(ModelError, match="not a scheduler for latent diffusion"):
        Solver(Stub(lambda output: output))


def draw(sample: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(sample.shape, generator=generator, dtype=sample.dtype)


def test_a_step_may_draw_more_than_once() -> None:
    rule = DrawingStub(lambda output, sample, generator: (
        sample - output + 2 * draw(sample, generator).mul_(0.5) + 3 * draw(sample, generator)
    ))  # fmt: skip
    table = Solver(rule).table(2)
    assert table.draws == (2, 2)
    assert table.coefficients.tolist() == [[1, -1, 1, 3, 0, 0, 0], [1, -1, 1, 3, -1, 1, 3]]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda output, sample, g: sample + torch.rand(sample.shape, generator=g), "noise that is not normal"),
        (lambda output, sample, g: sample + torch.empty_like(sample).normal_(generator=g), "noise that is not normal"),
        (lambda output, sample, g: sample + torch.randn(1, generator=g), "noise of another shape"),
        (lambda output, sample, g: sample + draw(sample, g).clamp(-1, 1), "not linear"),
        (
            lambda output, sample, g: sample + draw(sample, g) + torch.randn(sample.shape),
            "draws noise from a global generator",
        ),
        # Noise that depends on the generator's seed but is not drawn from it, like that of a Brownian tree.
        (lambda output, sample, g: sample + draw(sample, torch.Generator().manual_seed(g.initial_seed())), "linear"),
    ],
    ids=["uniform", "in place", "shape", "clipped", "global", "seeded"],
)
def test_draws_that_the_packer_cannot_reproduce_are_rejected(rule: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=f"DrawingStub .*{reason}.*--scheduler"):
        Solver(DrawingStub(rule))
