"""Rows enter and leave a denoiser batch of one shape."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor

from batch_infer.diffusion import Context, Slots, Solver
from batch_infer.diffusion.packer import draw_noise, guide
from batch_infer.diffusion.solver import CACHED_TABLES
from batch_infer.records import SamplingParams

SHAPE = (2, 4, 4)
CPU = torch.device("cpu")


class Network:
    """A denoiser that computes each row independently and records the shapes of its calls."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._layer = torch.nn.Conv2d(2, 2, 3, padding=1)
        self.shapes: set[tuple[int, ...]] = set()

    @torch.inference_mode()
    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        self.shapes.add((*sample.shape, *timestep.shape))
        prompt = context["prompt"].mean(dim=1).reshape(-1, 1, 1, 1)
        return torch.tanh(self._layer(sample) + prompt) + timestep.reshape(-1, 1, 1, 1) / 1000


@pytest.fixture(scope="module")
def solver() -> Solver:
    return Solver(DDIMScheduler(clip_sample=False))


def make_slots(size: int = 5) -> Slots[str]:
    return Slots(Network(), size, SHAPE, CPU, torch.float32)


def admit(slots: Slots[str], solver: Solver, name: str, **values: Any) -> None:
    """Admit a row whose seed and prompt are derived from its name."""
    seed = sum(name.encode())
    params = SamplingParams(32, 32, values.get("steps", 3), values.get("guidance", 3.0), values.get("rescale", 0.0))
    prompt = torch.full((3,), values.get("prompt", seed / 500))
    contexts = ({"prompt": prompt}, {"prompt": torch.zeros(3)} if params.uses_guidance else None)
    slots.admit(name, params, seed, solver.table(params.num_inference_steps), contexts)


def finish(slots: Slots[str]) -> dict[str, torch.Tensor]:
    latents = {}
    while slots.has_rows:
        latents.update({row.tag: row.latents for row in slots.tick()})
    return latents


def test_a_guided_row_takes_two_slots_and_an_unguided_row_one(solver: Solver) -> None:
    slots = make_slots(size=5)
    admit(slots, solver, "guided")
    assert slots.free_count == 3
    admit(slots, solver, "unguided", guidance=1.0)
    assert slots.free_count == 2
    admit(slots, solver, "guided too", steps=2)
    assert slots.free_count == 0
    assert [row.tag for row in slots.tick()] == []
    assert slots.free_count == 0
    assert [row.tag for row in slots.tick()] == ["guided too"]
    assert slots.free_count == 2
    assert [row.tag for row in slots.tick()] == ["guided", "unguided"]
    assert (slots.free_count, slots.has_rows) == (5, False)


def test_all_unet_calls_have_the_same_shape(solver: Solver) -> None:
    network = Network()
    slots: Slots[str] = Slots(network, 4, SHAPE, CPU, torch.float32)
    for steps in (1, 2, 5):
        admit(slots, solver, "row", steps=steps)
        finish(slots)
    assert network.shapes == {(4, *SHAPE, 4)}


def test_guidance_without_an_unconditional_part_is_a_bug(solver: Solver) -> None:
    params = SamplingParams(32, 32, 3, 7.5, 0.0)
    with pytest.raises(ValueError, match="unconditional"):
        make_slots().admit("row", params, 0, solver.table(3), ({"prompt": torch.zeros(3)}, None))


@pytest.mark.parametrize("drawing", [False, True], ids=["ddim", "ancestral"])
@pytest.mark.parametrize("values", [{}, {"guidance": 1.0}, {"rescale": 0.7}, {"steps": 6}], ids=str)
def test_a_rows_bytes_do_not_depend_on_its_neighbours(solver: Solver, values: dict[str, Any], drawing: bool) -> None:
    """The row is rendered alone, among other rows, in other batch positions, admitted late, and after a row of NaN."""
    ancestral = Solver(EulerAncestralDiscreteScheduler())
    own = ancestral if drawing else solver
    alone = make_slots()
    admit(alone, own, "the row", **values)
    expected = finish(alone)["the row"]

    crowded = make_slots()
    admit(crowded, ancestral, "short", steps=2, guidance=1.0)
    admit(crowded, solver, "broken", steps=2, prompt=float("nan"))
    crowded.tick()
    admit(crowded, own, "the row", **values)
    actual = finish(crowded)
    assert actual["broken"].isnan().all()
    assert torch.equal(actual["the row"], expected)

    admit(crowded, ancestral, "rescaled", rescale=1.0, steps=9)  # other batch positions, and those of the broken row
    crowded.tick()
    admit(crowded, own, "the row", **values)
    torch.randn(7)  # the global generator has no effect
    assert torch.equal(finish(crowded)["the row"], expected)


def test_a_row_equals_the_loop_of_its_own_scheduler() -> None:
    """Rows of several samplers share the slots. Each is compared with the loop of its scheduler."""
    network, slots = Network(), make_slots(size=8)
    schedulers = {
        "ddim": DDIMScheduler(clip_sample=False),
        "heun": HeunDiscreteScheduler(),
        "ancestral": EulerAncestralDiscreteScheduler(),
        "lcm": LCMScheduler(),
    }
    for name, scheduler in schedulers.items():
        admit(slots, Solver(scheduler), name, steps=4)
    actual = finish(slots)
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(4)
        seed = sum(name.encode())
        generator = torch.Generator().manual_seed(seed)
        drawing = {} if name == "heun" else {"generator": generator}
        sample = draw_noise(SHAPE, generator)[None] * scheduler.init_noise_sigma
        context = {"prompt": torch.stack([torch.zeros(3), torch.full((3,), seed / 500)])}
        for timestep in scheduler.timesteps:
            pair = scheduler.scale_model_input(torch.cat([sample] * 2), timestep)
            negative, positive = network.denoise(pair, timestep.float().expand(2), context).chunk(2)
            output = negative + 3.0 * (positive - negative)
            sample = scheduler.step(output, timestep, sample, **drawing, return_dict=False)[0]
        assert torch.allclose(actual[name], sample[0], atol=1e-5 * float(sample.abs().max()))


def test_noise_equals_that_of_a_pipeline() -> None:
    own, theirs = (torch.Generator().manual_seed(2**63 - 1) for _ in range(2))
    for _ in range(3):
        expected = randn_tensor((1, *SHAPE), generator=theirs, dtype=torch.float32)
        assert torch.equal(draw_noise(SHAPE, own), expected[0])


def test_tables_on_the_device_are_shared_and_released(solver: Solver) -> None:
    """Rows with the same table share its copy, and only the latest tables are kept."""
    slots = make_slots(size=4)
    admit(slots, solver, "first", steps=3)
    admit(slots, solver, "second", steps=3)
    first, second = slots._rows.values()
    assert first.coefficients.data_ptr() == second.coefficients.data_ptr()
    table = weakref.ref(first.table.coefficients)
    finish(slots)
    del first, second
    for steps in range(10, 10 + CACHED_TABLES):
        admit(slots, solver, "other", steps=steps, guidance=1.0)
        finish(slots)
    assert table() is None


def test_guidance_of_each_row_equals_that_of_diffusers() -> None:
    conditional, unconditional = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(0))
    scale, rescale = torch.tensor([1.0, 7.5, 7.5, 3.0]), torch.tensor([0.0, 0.0, 0.7, 1.0])
    unconditional[0] = conditional[0]
    guided = guide(conditional, unconditional, scale, rescale)
    assert torch.equal(guided[0], conditional[0])
    for k in range(4):
        expected = unconditional[k : k + 1] + scale[k] * (conditional[k : k + 1] - unconditional[k : k + 1])
        if rescale[k] > 0:
            expected = rescale_noise_cfg(expected, conditional[k : k + 1], float(rescale[k]))
        assert torch.allclose(guided[k], expected[0], atol=1e-6)
    without = guide(conditional, unconditional, scale, None)
    assert torch.equal(without[:2], guided[:2])


def test_a_flat_prediction_is_unaffected_by_a_neighbours_rescale() -> None:
    flat = torch.ones(2, *SHAPE)
    guided = guide(flat, flat, torch.tensor([7.5, 7.5]), torch.tensor([0.0, 0.7]))
    assert torch.equal(guided[0], flat[0])


def test_rescale_has_no_effect_without_guidance(solver: Solver) -> None:
    actual = []
    for values in ({"guidance": 1.0}, {"guidance": 0.0}, {"guidance": 1.0, "rescale": 0.7}):
        slots = make_slots()
        admit(slots, solver, "row", **values)
        actual.append(finish(slots)["row"])
    assert torch.equal(actual[0], actual[1])
    assert torch.equal(actual[0], actual[2])
