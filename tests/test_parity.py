"""Images from batches compared with the reference: diffusers' pipeline, called for a single row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batch_infer.errors import ModelError
from batch_infer.models import load_solver, read_card
from batch_infer.safety.checker import StableDiffusionChecker
from batch_infer.settings import ModelSettings, SchedulerSpec
from tests.checkpoints import amend
from tests.oracle import assert_close, assert_parity, call_diffusers, load_pipeline, with_scheduler
from tests.rendering import copy_folder, load_family, make_request, render

CHECKPOINTS = ("demo", "sd1", "sd2", "sdxl", "sdxl_turbo")
DISTINCT = ("sd1", "sd2", "sdxl")
"""Checkpoints whose networks have different architectures."""
SCHEDULERS = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerDiscreteScheduler:use_karras_sigmas=true",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepScheduler:use_karras_sigmas=true",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++",
    "DPMSolverSinglestepScheduler:algorithm_type=sde-dpmsolver++",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "DDPMScheduler",
)
GRID = [
    *(("sd1", scheduler) for scheduler in SCHEDULERS),
    *(("sd2", scheduler) for scheduler in SCHEDULERS[::2]),
    *(("sdxl", scheduler) for scheduler in SCHEDULERS[1::5]),
]
"""Every scheduler, and some also with a UNet that predicts velocity or with SDXL's second text encoder."""
REFUSED = {
    "DDIMScheduler:clip_sample=true": "clip_sample=true is not supported",
    "DDIMScheduler:thresholding=true": "thresholding=true is not supported",
    "DPMSolverMultistepScheduler:thresholding=true": "thresholding=true is not supported",
    "UniPCMultistepScheduler:thresholding=true": "thresholding=true is not supported",
}
SHORT = (
    make_request("short", "a red circle", steps=4, guidance=1.0, seed=11),
    make_request("negative", "two blue squares", steps=5, guidance=7.5, negative="green", seed=12),
    make_request("rescaled", "a small star", steps=8, guidance=7.5, rescale=0.7, negative="a large ring", seed=13),
    make_request("long", "a red circle", steps=16, guidance=7.5, seed=14),
)
LONG = (
    make_request("unguided", "a red circle", steps=30, guidance=1.0, seed=21),
    make_request("guided", "two blue squares", steps=20, guidance=7.5, seed=22),
    make_request("rescaled", "a small star", steps=37, guidance=7.5, rescale=0.7, negative="a large ring", seed=23),
    make_request("negative", "a purple heart", steps=50, guidance=7.5, negative="green", seed=24),
)

Pipelines = dict[str, Any]
Families = dict[str, Any]


@pytest.fixture(scope="module")
def folders(request: pytest.FixtureRequest) -> dict[str, Path]:
    return {name: request.getfixturevalue(f"{name}_folder") for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> Pipelines:
    """The reference pipeline of each checkpoint, without safety checker."""
    return {name: load_pipeline(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def families(folders: dict[str, Path]) -> Families:
    return {name: load_family(folders[name]) for name in DISTINCT}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(checkpoint: str, folders: dict[str, Path]) -> Path:
    return folders[checkpoint]


@pytest.mark.parametrize(("checkpoint", "scheduler"), GRID)
def test_batched_rows_match_single_rows(
    pipelines: Pipelines, families: Families, folder: Path, checkpoint: str, scheduler: str
) -> None:
    model = families[checkpoint]
    model.solver = load_solver(read_card(ModelSettings(str(folder), scheduler=SchedulerSpec.parse(scheduler))))
    assert_parity(with_scheduler(pipelines[checkpoint], scheduler), model, SHORT)


@pytest.mark.soak
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_long_rows_match_single_rows(pipelines: Pipelines, checkpoint: str, folder: Path, scheduler: str) -> None:
    assert_parity(with_scheduler(pipelines[checkpoint], scheduler), load_family(folder, scheduler), LONG)


def test_sizes_and_texts_with_the_checkpoints_own_scheduler(
    pipelines: Pipelines, checkpoint: str, folder: Path
) -> None:
    rows = (
        make_request("wide", "a red circle", steps=5, size=(48, 80), seed=1),
        make_request("wide, unguided", "a red circle", steps=6, guidance=1.0, size=(48, 80), seed=2),
        make_request("tall", "two blue squares", steps=5, negative="", size=(96, 32), seed=3),
        make_request("odd latents", "a star", steps=4, guidance=3.0, size=(72, 88), seed=4),
        make_request("empty", "", steps=5, guidance=2.0, negative="green", seed=5),
        make_request("too long", "a small star and " * 40, steps=5, negative="a ring, " * 60, seed=6),
        make_request("hardly guided", "two blue squares", steps=5, guidance=1.001, rescale=1.0, seed=7),
        make_request("below one", "two blue squares", steps=5, guidance=0.0, rescale=0.7, seed=2**63 - 1),
    )
    assert_parity(pipelines[checkpoint], load_family(folder), rows)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_match_diffusers(pipelines: Pipelines, sd1_folder: Path, steps: int) -> None:
    """PNDM's first steps are special, and its list of timesteps is longer than the count."""
    assert_parity(pipelines["sd1"], load_family(sd1_folder), (make_request("few", steps=steps, seed=steps),))


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_outdated_scheduler_settings_are_corrected_as_in_diffusers(sd1_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(sd1_folder, tmp_path)
    amend(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    rows = (make_request("first", steps=5), make_request("second", steps=8, guidance=1.0, seed=9))
    assert_parity(load_pipeline(folder), load_family(folder), rows)
    ddim = "DDIMScheduler"
    assert_parity(with_scheduler(load_pipeline(folder), ddim), load_family(folder, ddim), rows)


def test_the_comparison_detects_another_sampler(pipelines: Pipelines, sd1_folder: Path) -> None:
    """This includes a sampler of the same order."""
    request = make_request(steps=25, seed=14)
    image = render(load_family(sd1_folder, "DPMSolverMultistepScheduler"), [request])["row"].pixels
    oracle, _ = call_diffusers(with_scheduler(pipelines["sd1"], "DEISMultistepScheduler"), request)
    with pytest.raises(AssertionError):
        assert_close(image, oracle)


def test_the_checkers_verdicts_equal_those_of_diffusers(sd1_folder: Path) -> None:
    model = load_family(sd1_folder, with_checker=True)
    checker = StableDiffusionChecker(model.safety_checker, model.feature_extractor, batch=3)
    pipe = load_pipeline(sd1_folder, requires_safety_checker=True)
    rows = [make_request(str(k), "a red circle", steps=4, guidance=1.0, seed=k) for k in range(12)]
    rendered = render(model, rows, decode=3, checker=checker)
    oracle = {row.id: call_diffusers(pipe, row)[1] for row in rows}
    assert {name: [image.verdict.nsfw] for name, image in rendered.items()} == oracle
    assert {True, False} == {image.verdict.nsfw for image in rendered.values()}


@pytest.mark.parametrize(("scheduler", "reason"), REFUSED.items())
def test_schedulers_that_do_not_support_step_level_batching_are_refused(
    sd1_folder: Path, scheduler: str, reason: str
) -> None:
    with pytest.raises(ModelError) as refusal:
        load_family(sd1_folder, scheduler)
    message = str(refusal.value)
    assert reason in message
    assert message.startswith(scheduler.partition(":")[0])
    assert "--scheduler" in message
    assert "\n" not in message
