"""Images against the oracle: diffusers' own pipeline, called for one row alone."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from batch_infer.errors import ModelError
from batch_infer.records import PromptRequest
from batch_infer.safety.checker import StableDiffusionChecker
from batch_infer.settings import SchedulerSpec
from tests.checkpoints import amend
from tests.rendering import copied, furthest, load_family, make_request, render

CHECKPOINTS = ("demo", "sd1", "sd2")
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
)
REFUSED = {
    "EulerAncestralDiscreteScheduler": "draws noise",
    "KDPM2AncestralDiscreteScheduler": "draws noise",
    "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++": "draws noise",
    "DPMSolverSinglestepScheduler:algorithm_type=sde-dpmsolver++": "draws noise",
    "SASolverScheduler": "draws noise",
    "LCMScheduler": "draws noise",
    "TCDScheduler": "draws noise",
    "DDPMScheduler": "draws noise",
    "DDIMScheduler:clip_sample=true": "clip_sample=true cannot be packed",
    "DDIMScheduler:thresholding=true": "thresholding=true cannot be packed",
    "DPMSolverMultistepScheduler:thresholding=true": "thresholding=true cannot be packed",
    "UniPCMultistepScheduler:thresholding=true": "thresholding=true cannot be packed",
}
SHORT = (
    make_request("short", "a red circle", steps=4, guidance=1.0, seed=11),
    make_request("negative", "two blue squares", steps=7, guidance=7.5, negative="green", seed=12),
    make_request("rescaled", "a small star", steps=12, guidance=7.5, rescale=0.7, negative="a large ring", seed=13),
    make_request("long", "a red circle", steps=25, guidance=7.5, seed=14),
)
LONG = (
    make_request("unguided", "a red circle", steps=30, guidance=1.0, seed=21),
    make_request("guided", "two blue squares", steps=20, guidance=7.5, seed=22),
    make_request("rescaled", "a small star", steps=37, guidance=7.5, rescale=0.7, negative="a large ring", seed=23),
    make_request("negative", "a purple heart", steps=50, guidance=7.5, negative="green", seed=24),
)

Pipelines = dict[str, StableDiffusionPipeline]


@pytest.fixture(scope="module")
def pipelines(demo_folder: Path, sd1_folder: Path, sd2_folder: Path) -> Pipelines:
    """The oracle of each checkpoint, without its checker."""
    folders = dict(zip(CHECKPOINTS, (demo_folder, sd1_folder, sd2_folder), strict=True))
    return {name: load_pipeline(folder) for name, folder in folders.items()}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(checkpoint: str, request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"{checkpoint}_folder")
    return found


def load_pipeline(folder: Path, **components: object) -> StableDiffusionPipeline:
    leave_out = components or {"safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **leave_out)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_scheduler(pipe: StableDiffusionPipeline, text: str) -> StableDiffusionPipeline:
    """The same parts under another scheduler, made as diffusers' guide says."""
    spec = SchedulerSpec.parse(text)
    scheduler = getattr(diffusers, spec.name).from_config(pipe.scheduler.config, **dict(spec.options))
    other = StableDiffusionPipeline(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def ask(pipe: StableDiffusionPipeline, request: PromptRequest) -> tuple[np.ndarray, list[bool] | None]:
    """What diffusers makes of one row: its image (H, W, 3) uint8, and what its checker says."""
    params = request.params
    answer = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        guidance_rescale=params.guidance_rescale,
        height=params.height,
        width=params.width,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="np",
    )
    return (answer.images[0] * 255).round().astype(np.uint8), answer.nsfw_content_detected


def assert_close(image: np.ndarray, oracle: np.ndarray) -> None:
    """At most 1 of 255 anywhere; and seldom at all, since only a value next to a half can be rounded otherwise."""
    assert image.shape == oracle.shape
    assert furthest(image, oracle) <= 1
    assert np.mean(image != oracle) < 0.01


def assert_parity(pipe: StableDiffusionPipeline, model: object, requests: tuple[PromptRequest, ...]) -> None:
    """Rows rendered in one packed call look as they do alone; and no two alike, so that a mix-up would show."""
    rendered = render(model, requests, slots=6, decode=2)
    assert rendered.keys() == {request.id for request in requests}
    oracles = {request.id: ask(pipe, request)[0] for request in requests}
    for name, oracle in oracles.items():
        assert_close(rendered[name].pixels, oracle)
        others = [image for other, image in oracles.items() if other != name and image.shape == oracle.shape]
        assert all(furthest(oracle, other) > 2 for other in others)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_packed_rows_look_as_they_do_alone(pipelines: Pipelines, checkpoint: str, folder: Path, scheduler: str) -> None:
    assert_parity(with_scheduler(pipelines[checkpoint], scheduler), load_family(folder, scheduler), SHORT)


@pytest.mark.soak
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_long_rows_look_as_they_do_alone(pipelines: Pipelines, checkpoint: str, folder: Path, scheduler: str) -> None:
    assert_parity(with_scheduler(pipelines[checkpoint], scheduler), load_family(folder, scheduler), LONG)


def test_sizes_and_texts_under_the_checkpoints_own_scheduler(
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
def test_fewest_steps(pipelines: Pipelines, sd1_folder: Path, steps: int) -> None:
    """PNDM's first steps are special, and its list of timesteps is longer than the count."""
    assert_parity(pipelines["sd1"], load_family(sd1_folder), (make_request("few", steps=steps, seed=steps),))


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_outdated_scheduler_settings_are_mended_as_diffusers_does(sd1_folder: Path, tmp_path: Path) -> None:
    folder = copied(sd1_folder, tmp_path)
    amend(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    rows = (make_request("first", steps=5), make_request("second", steps=8, guidance=1.0, seed=9))
    assert_parity(load_pipeline(folder), load_family(folder), rows)
    ddim = "DDIMScheduler"
    assert_parity(with_scheduler(load_pipeline(folder), ddim), load_family(folder, ddim), rows)


def test_another_sampler_would_show(pipelines: Pipelines, sd1_folder: Path) -> None:
    """The comparison is sharp enough to tell solvers of the same order apart."""
    request = make_request(steps=25, seed=14)
    image = render(load_family(sd1_folder, "DPMSolverMultistepScheduler"), [request])["row"].pixels
    oracle, _ = ask(with_scheduler(pipelines["sd1"], "DEISMultistepScheduler"), request)
    with pytest.raises(AssertionError):
        assert_close(image, oracle)


def test_the_checkers_verdict_is_diffusers_verdict(sd1_folder: Path) -> None:
    model = load_family(sd1_folder, with_checker=True)
    judge = StableDiffusionChecker(model.safety_checker, model.feature_extractor, batch=3)
    pipe = load_pipeline(sd1_folder, requires_safety_checker=True)
    rows = [make_request(str(k), "a red circle", steps=4, guidance=1.0, seed=k) for k in range(12)]
    rendered = render(model, rows, decode=3, judge=judge)
    said = {row.id: ask(pipe, row)[1] for row in rows}
    assert {name: [image.verdict.nsfw] for name, image in rendered.items()} == said
    assert {True, False} == {image.verdict.nsfw for image in rendered.values()}


@pytest.mark.parametrize(("scheduler", "reason"), REFUSED.items())
def test_schedulers_that_cannot_be_packed_are_refused(sd1_folder: Path, scheduler: str, reason: str) -> None:
    with pytest.raises(ModelError) as refusal:
        load_family(sd1_folder, scheduler)
    sentence = str(refusal.value)
    assert reason in sentence
    assert sentence.startswith(scheduler.partition(":")[0])
    assert "--scheduler" in sentence  # the way out
    assert "\n" not in sentence
