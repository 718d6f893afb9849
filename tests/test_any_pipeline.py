"""Pipelines without a model family: images compared with single calls of diffusers, and runs of the command."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from batch_infer.autotune import Probe
from batch_infer.chain import BatchSizes, RenderedImage, StepLevelChain, UnrenderedRow
from batch_infer.errors import FailedRowError, ModelError
from batch_infer.models import AnyPipeline, ModelCard, inspect_pipeline, read_card
from batch_infer.models.pipeline_rules import find_class
from batch_infer.models.trial_calls import call_within_memory
from batch_infer.records import PromptRequest, SizeRules
from batch_infer.safety import ImageChecker
from batch_infer.safety.checker import StableDiffusionChecker
from batch_infer.settings import ModelSettings, SchedulerSpec
from batch_infer.stacking import trial
from tests import painting, stackers
from tests.checkpoints import amend
from tests.oracle import call_diffusers
from tests.paced import MODULE
from tests.painting import load_painting
from tests.pipelines import SAVE_FUNCTIONS, save_perturbed
from tests.pipelines.measuring import make_model, make_pipeline
from tests.rendering import CPU, copy_folder, make_request, max_difference
from tests.runs import QUICK, CommandResult, assert_whole, command, hashes, results, run, run_json, start, wait_for
from tests.tables import write_csv

NAMES = ("pixart", "flux", "z_image", "perturbed")
SIZES = {"pixart": (256, 256)}
"""Image sizes (height, width) of checkpoints, if not 64x64 pixels."""
GUIDED_BY_INPUT = {"flux"}
ONE_BY_ONE = {"perturbed"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("pipelines")
    saved = {name: save(parent / name) for name, save in SAVE_FUNCTIONS.items()}
    return {**saved, "perturbed": save_perturbed(sd1_folder, parent / "perturbed")}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, AnyPipeline]:
    return {name: load_model(folders[name]) for name in NAMES}


def card_of(folder: Path, **settings: Any) -> ModelCard:
    card = read_card(ModelSettings(name=str(folder), **settings))
    # The native size of Flux and Z-Image is always 1024 pixels, even for a tiny config.
    size = SIZES.get(folder.name, (64, 64))
    return replace(card, sizes=SizeRules(*size, card.sizes.side_multiple, card.sizes.min_side))


def load_model(folder: Path, scheduler: str | None = None, *, with_checker: bool = False) -> AnyPipeline:
    spec = SchedulerSpec.parse(scheduler) if scheduler else None
    return AnyPipeline.load(card_of(folder, scheduler=spec), CPU, torch.float32, with_checker=with_checker)


def load_reference(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    if "safety_checker" in pipe.components:
        pipe.register_modules(safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def row(model: str, name: str, prompt: str = "a red circle", **settings: Any) -> PromptRequest:
    request = make_request(name, prompt, **{"size": SIZES.get(model, (64, 64)), "steps": 3, **settings})
    return replace(request, params=replace(request.params, embedded_guidance=model in GUIDED_BY_INPUT))


def rows_of(model: str) -> list[PromptRequest]:
    """Return rows that together vary every field."""
    height, width = SIZES.get(model, (64, 64))
    rows = [row(model, "plain", seed=1), row(model, "other", "two blue squares beside a star", seed=2)]
    rows += [row(model, "weak", "a ring", guidance=1.0, steps=4, seed=3)]
    rows += [row(model, "wide", "a star", size=(height, width + 32), seed=2**63 - 1)]
    rows += [row(model, "long", "a small star and " * 40, seed=5)]
    if model not in GUIDED_BY_INPUT:
        rows += [row(model, "negative", negative="green", seed=6), row(model, "nothing", negative="", seed=7)]
    if model == "perturbed":
        rows += [row(model, "rescaled", rescale=0.7, seed=8)]
    return rows


def render(
    model: AnyPipeline, requests: list[PromptRequest], *, slots: int = 8, checker: ImageChecker | None = None
) -> dict[str, RenderedImage]:
    rendered = {}
    ordered = sorted(requests, key=lambda request: (request.params.height, request.params.width))
    for outcome in StepLevelChain(model, BatchSizes(slots, 2), checker).render(ordered):
        assert isinstance(outcome, RenderedImage), outcome.error
        rendered[outcome.request.id] = outcome
    return rendered


# Images


@pytest.mark.parametrize("name", NAMES)
def test_rows_match_single_calls(folders: dict[str, Path], models: dict[str, AnyPipeline], name: str) -> None:
    rows = rows_of(name)
    rendered, pipe = render(models[name], rows), load_reference(folders[name])
    references = {request.id: call_diffusers(pipe, request)[0] for request in rows}
    for one, expected in references.items():
        assert rendered[one].pixels.shape == expected.shape
        assert max_difference(rendered[one].pixels, expected) <= 1
        others = [image for other, image in references.items() if other != one and image.shape == expected.shape]
        assert all(max_difference(expected, other) > 2 for other in others)


@pytest.mark.promises
@pytest.mark.parametrize("name", NAMES)
def test_an_image_depends_only_on_its_row(models: dict[str, AnyPipeline], name: str) -> None:
    """Its bytes are the same alone and among other rows in any order, with texts of other lengths."""
    model, rows = models[name], rows_of(name)
    alone = {request.id: render(model, [request])[request.id].pixels for request in rows}
    others = [row(name, f"crowd {k}", "and more " * (k * k), seed=k) for k in range(5)]
    for order in ([*rows, *others], [*others[:2], *rows[::-1], *others[2:]]):
        together = render(model, order)
        for one, image in alone.items():
            assert np.array_equal(together[one].pixels, image), one


@pytest.mark.parametrize("name", NAMES)
def test_no_bit_depends_on_the_neighbours_texts(models: dict[str, AnyPipeline], name: str) -> None:
    """Values are compared before rounding. Texts that fill the encoder need no mask, but shorter texts do."""
    full, short, other = "and more " * 100, "a", "two blue squares"
    for text, neighbours_text in ((full, short), (short, full), (other, full)):
        first, neighbour = row(name, "row", text), row(name, "neighbour", neighbours_text)
        alone, together = (stackers.run(models[name], rows) for rows in ([first], [neighbour, first]))
        assert torch.equal(stackers.image_of(alone["row"]), stackers.image_of(together["row"]))


def test_text_encoders_use_the_same_kernel_for_every_batch(models: dict[str, AnyPipeline]) -> None:
    """On a GPU, the bytes depend on the kernel. On a CPU they do not at this size, so the kernel itself is compared."""
    for model in models.values():
        encoders = [part for name, part in model.pipeline.components.items() if name.startswith("text_encoder")]
        assert encoders
        assert {encoder.config._attn_implementation for encoder in encoders} == {"eager"}


def test_the_text_changes_the_image(models: dict[str, AnyPipeline]) -> None:
    for name, model in models.items():
        texts = [row(name, str(k), text, seed=9) for k, text in enumerate(["a red circle", "two blue squares"])]
        first, second = render(model, texts).values()
        assert max_difference(first.pixels, second.pixels) > 2


def test_rows_share_calls_unless_a_network_mixes_them(models: dict[str, AnyPipeline]) -> None:
    """The attention processors of perturbed attention guidance split their batch into parts."""
    assert {name for name, model in models.items() if model.plan.is_alone} == ONE_BY_ONE
    assert {name for name, model in models.items() if not model.plan.is_stacked} == ONE_BY_ONE
    for name, model in models.items():
        chain = StepLevelChain(model, BatchSizes(4, 2), None)
        assert len(list(chain.render([row(name, str(k), seed=k) for k in range(3)]))) == 3
        rows_per_call = 1 if name in ONE_BY_ONE else 4 if name in GUIDED_BY_INPUT else 2
        evaluations = 4 if name == "perturbed" else 3  # PNDM evaluates the first step twice
        assert chain.stages.ticks == evaluations * -(-3 // rows_per_call)


def test_another_scheduler_matches_diffusers(folders: dict[str, Path]) -> None:
    text = "EulerDiscreteScheduler:use_karras_sigmas=true"
    request, pipe = row("pixart", "row", steps=4), load_reference(folders["pixart"])
    before = call_diffusers(pipe, request)[0]
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    expected = call_diffusers(pipe, request)[0]
    pixels = render(load_model(folders["pixart"], text), [request])["row"].pixels
    assert max_difference(pixels, expected) <= 1
    assert max_difference(before, expected) > 2


def test_noise_at_every_step_comes_from_the_rows_generator(folders: dict[str, Path]) -> None:
    """The pipeline passes the rows' generators to a scheduler that draws noise."""
    model = load_model(folders["pixart"], "EulerAncestralDiscreteScheduler")
    first, other = row("pixart", "first", seed=1), row("pixart", "other", seed=2)
    alone, together = render(model, [first]), render(model, [other, first])
    assert np.array_equal(alone["first"].pixels, together["first"].pixels)


def test_noise_that_does_not_depend_on_the_seed_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"FluxPipeline with FlowMatchEulerDiscreteScheduler draws noise \(randn"):
        load_model(folders["flux"], "FlowMatchEulerDiscreteScheduler:stochastic_sampling=true")


def test_a_scheduler_that_the_pipeline_does_not_support_is_refused(folders: dict[str, Path]) -> None:
    """FluxPipeline passes custom sigmas, which this scheduler does not take. Otherwise, every row would be invalid."""
    with pytest.raises(ModelError, match=r"FluxPipeline does not support --scheduler FlowMatchHeunDisc.*custom sigmas"):
        load_model(folders["flux"], "FlowMatchHeunDiscreteScheduler")


def test_the_checkers_verdicts_equal_those_of_diffusers(folders: dict[str, Path]) -> None:
    model = load_model(folders["perturbed"], with_checker=True)
    checker = StableDiffusionChecker(model.safety_checker, model.feature_extractor, batch=2)
    rows = [row("perturbed", str(k), guidance=1.0, seed=k) for k in range(12)]
    rendered = render(model, rows, checker=checker)
    pipe = DiffusionPipeline.from_pretrained(folders["perturbed"])
    pipe.set_progress_bar_config(disable=True)
    flagged = {
        request.id: pipe(
            request.prompt, num_inference_steps=3, guidance_scale=1.0, height=64, width=64, output_type="np",
            generator=torch.Generator().manual_seed(request.seed),
        ).nsfw_content_detected[0]
        for request in rows
    }  # fmt: skip
    assert {name: image.verdict.nsfw for name, image in rendered.items()} == flagged
    assert set(flagged.values()) == {True, False}
    assert all(image.pixels.any() for image in rendered.values()), "no image is black before --on-flagged is applied"


# Rows that a pipeline does not support


def make_fail(model: AnyPipeline, error: Exception, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pipeline raise an error for calls with this prompt."""
    call = type(model.pipeline).__call__

    @functools.wraps(call)
    def fail(pipeline: Any, **arguments: Any) -> Any:
        if prompt in arguments["prompt"]:
            raise error
        return call(pipeline, **arguments)

    monkeypatch.setattr(type(model.pipeline), "__call__", fail)


@pytest.mark.parametrize(
    ("error", "invalid", "message"),
    [
        (ValueError("no such text\nand more"), True, "FluxPipeline does not support this row: no such text"),
        (
            IndexError("index 3 is out of bounds"),
            True,
            "FluxPipeline does not support this row: index 3 is out of bounds",
        ),
        (RuntimeError("shapes do not match"), False, "FluxPipeline failed: shapes do not match"),
    ],
)
def test_an_error_fails_its_row_and_not_the_neighbours(
    models: dict[str, AnyPipeline], monkeypatch: pytest.MonkeyPatch, error: Exception, invalid: bool, message: str
) -> None:
    model = models["flux"]
    rows = [row("flux", "a", seed=1), row("flux", "bad", "bad", seed=2), row("flux", "c", seed=3)]
    expected = render(model, rows)
    make_fail(model, error, "bad", monkeypatch)
    outcomes = {outcome.request.id: outcome for outcome in StepLevelChain(model, BatchSizes(8, 2), None).render(rows)}
    for name in "ac":
        image = outcomes[name]
        assert isinstance(image, RenderedImage)
        assert np.array_equal(image.pixels, expected[name].pixels)
    bad = outcomes["bad"]
    assert isinstance(bad, UnrenderedRow)
    assert (bad.status == "invalid", bad.error) == (invalid, message)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        torch.AcceleratorError("an error of the device, by its type"),
        RuntimeError("CUDA error: device-side assert"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        ValueError("CUDA driver error: unknown error"),
    ],
)
def test_a_lost_device_fails_no_row(
    models: dict[str, AnyPipeline], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    make_fail(models["flux"], error, "bad", monkeypatch)
    with pytest.raises(type(error)) as raised:
        stackers.run(models["flux"], [row("flux", "bad", "bad")])
    assert not isinstance(raised.value, FailedRowError)


def test_a_device_lost_during_trial_calls_is_reported(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(trial, "compare_calls", fail)
    with pytest.raises(RuntimeError, match="cuDNN error"):
        load_model(folders["flux"])


def test_free_memory_does_not_decide_whether_rows_share_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trial calls that do not fit into memory are repeated at a small size, or the model does not fit."""
    with monkeypatch.context() as patch:
        patch.setattr(painting.Denoiser, "memory", 1)
        with pytest.raises(torch.OutOfMemoryError):
            load_painting()
    rules = replace(painting.RULES, sizes=SizeRules(128, 128, 8, 8))
    monkeypatch.setattr(painting.Denoiser, "max_side", 32)
    assert load_painting(rules=rules).plan.is_stacked
    sides: list[int] = []

    def try_plan(make_arguments: Any) -> str:
        sides.append(make_arguments())
        if len(sides) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "plan"

    native, small = lambda *_: 512, lambda *_: 128
    assert call_within_memory(try_plan, native, small) == "plan"  # type: ignore[arg-type]
    assert sides == [512, 128]


def test_a_structural_obstacle_is_found_at_the_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trial calls at the native size follow only if the pipeline refuses the small one. They can take an hour."""
    rules = replace(painting.RULES, sizes=SizeRules(128, 128, 8, 8))
    sides: list[int] = []
    render = trial._Trial._render

    def record(self: Any, plan: Any, rows: Any) -> Any:
        sides.append(self._make_arguments([""], True)["height"])
        return render(self, plan, rows)

    monkeypatch.setattr(trial._Trial, "_render", record)
    assert load_painting(painting.ChunkingPipeline, rules).plan.is_alone
    assert set(sides) == {32}
    monkeypatch.setattr(painting.PaintingPipeline, "min_side", 64)
    sides.clear()
    assert load_painting(painting.ChunkingPipeline, rules).plan.is_alone
    assert set(sides) == {128}


def test_a_processor_does_not_open_the_prompt_as_an_image(sd1_folder: Path, tmp_path: Path) -> None:
    """The `tokenizer` of some pipelines is a processor, whose first argument is an image, or its path or URL."""
    model, tokenizer = load_painting(), CLIPTokenizer.from_pretrained(sd1_folder / "tokenizer")
    model.pipeline.tokenizer = CLIPProcessor(CLIPImageProcessor(), tokenizer)
    for prompt in ("a red circle", str(tmp_path), "http://127.0.0.1:9/image.png"):
        assert model.count_tokens(row("flux", "row", prompt)).prompt_tokens == len(tokenizer.tokenize(prompt)) > 0


def test_a_prompt_is_rewritten_without_sampling() -> None:
    """LongCat-Image's checkpoint asks for sampling, which would draw from the global generator."""
    pipeline = make_pipeline("LongCatImagePipeline")
    pipeline.text_encoder.generation_config.update(do_sample=True, temperature=0.1, top_p=0.001, top_k=1)
    assert make_model(pipeline).plan.is_stacked


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_missing_library_of_a_component_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    """The processor of FLUX.2 needs torchvision. Without it, transformers has a placeholder of the class."""
    copy = copy_folder(folders["z_image"], tmp_path)
    amend(copy / "model_index.json", tokenizer=["transformers", "PixtralProcessor"])
    with pytest.raises(ModelError, match=r"tokenizer \(PixtralProcessor\) needs torchvision: pip install torchvision"):
        inspect_pipeline(copy)


def test_a_call_of_rows_that_run_alone() -> None:
    """bench compares with it."""
    model = load_painting(painting.ChunkingPipeline)
    params = replace(painting.paint_row().params, num_inference_steps=2)
    call = model.make_call(8, params)
    model.pipeline.transformer.calls.clear()
    call()
    assert model.pipeline.transformer.calls == [2]


def test_an_image_on_the_host_moves_to_the_device() -> None:
    """Otherwise the stream that decodes could not use it."""
    model: Any = SimpleNamespace(pipeline=None, device=torch.device("meta"))
    request = make_request("row", size=(64, 64))
    image = AnyPipeline.read_image(model, request, (np.zeros((1, 64, 64, 3)),), None)
    assert (image.device.type, image.shape, image.dtype) == ("meta", (3, 64, 64), torch.float32)


def test_a_size_that_the_pipeline_rounds_is_refused(models: dict[str, AnyPipeline]) -> None:
    (outcome,) = StepLevelChain(models["flux"], BatchSizes(4, 2), None).render([row("flux", "row", size=(64, 72))])
    assert isinstance(outcome, UnrenderedRow)
    assert outcome.status == "invalid"
    assert outcome.error.startswith("FluxPipeline makes images of 64x64 pixels instead of 72x64")


def test_values_that_are_not_finite_are_reported(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = copy_folder(folders["flux"], tmp_path)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"].fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    (outcome,) = StepLevelChain(load_model(copy), BatchSizes(4, 2), None).render([row("flux", "row", guidance=2.5)])
    assert isinstance(outcome, UnrenderedRow)
    assert outcome.status == "failed"
    assert "not finite at 3 steps and guidance_scale 2.5" in outcome.error


# The card


def test_sampling_rules_follow_from_class_and_configs(folders: dict[str, Path]) -> None:
    cards = {name: read_card(ModelSettings(name=str(folder))) for name, folder in folders.items()}
    assert {card.family for card in cards.values()} == {"any_pipeline"}
    assert {name: (card.num_inference_steps, card.guidance_scale) for name, card in cards.items()} == {
        "pixart": (20, 4.5), "flux": (28, 3.5), "z_image": (50, 5.0), "perturbed": (50, 7.5),
    }  # fmt: skip
    assert {name: [field for field, _ in card.unsupported_fields] for name, card in cards.items()} == {
        "pixart": ["guidance_rescale"], "flux": ["negative_prompt", "guidance_rescale"],
        "z_image": ["guidance_rescale"], "perturbed": [],
    }  # fmt: skip
    assert {name for name, card in cards.items() if card.embedded_guidance} == GUIDED_BY_INPUT
    assert {name for name, card in cards.items() if card.has_checker} == {"perturbed"}
    assert cards["pixart"].sizes == SizeRules(256, 256, 16, 16)
    assert cards["flux"].sizes == SizeRules(1024, 1024, 16, 16)
    assert cards["perturbed"].sizes == SizeRules(64, 64, 8, 16)
    assert len({card.fingerprint for card in cards.values()}) == len(cards)


def test_a_distilled_flux_has_no_guidance(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = copy_folder(folders["flux"], tmp_path)
    amend(copy / "transformer" / "config.json", guidance_embeds=False)
    card = read_card(ModelSettings(name=str(copy)))
    assert ("guidance_scale", 1.0) in card.unsupported_fields
    assert (card.guidance_scale, card.embedded_guidance) == (1.0, False)


def test_the_fingerprint_changes_with_the_class(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = copy_folder(folders["perturbed"], tmp_path)
    before = card_of(copy).fingerprint
    amend(copy / "model_index.json", _diffusers_version="0.1")
    assert card_of(copy).fingerprint == before
    amend(copy / "model_index.json", _class_name="StableDiffusionSAGPipeline")
    assert card_of(copy).fingerprint != before


def test_the_fingerprint_changes_with_the_prompt_template(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = copy_folder(folders["z_image"], tmp_path)
    before = card_of(copy).fingerprint
    template = copy / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text("utf-8") + "!", "utf-8")
    assert card_of(copy).fingerprint != before


def test_reading_a_card_loads_no_torch_if_another_process_inspects_the_pipeline(folders: dict[str, Path]) -> None:
    script = f"""
import sys
from batch_infer.models import SamplingRules, read_card
from batch_infer.records import SizeRules
from batch_infer.settings import ModelSettings
facts = SamplingRules(SizeRules(8, 8, 8, 8), 7, 3.0)
card = read_card(ModelSettings(name={str(folders["flux"])!r}), lambda path: facts)
print(card.family, card.num_inference_steps, sorted({{"torch", "diffusers", "transformers"}} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "any_pipeline 7 []\n"


def test_a_pipeline_is_inspected_again_only_if_its_files_change(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, inspected = copy_folder(folders["flux"], tmp_path / "flux"), list[Path]()

    def call(_: Probe, function: Any, path: Path) -> Any:
        inspected.append(path)
        return function(path)

    monkeypatch.setattr(Probe, "_call", call)
    first, second = Probe().inspect_pipeline(folder), Probe().inspect_pipeline(folder)
    assert first == second == inspect_pipeline(folder)
    assert inspected == [folder]
    amend(folder / "transformer" / "config.json", guidance_embeds=not first.embedded_guidance)
    assert Probe().inspect_pipeline(folder).embedded_guidance != first.embedded_guidance
    assert inspected == [folder] * 2


@pytest.mark.promises
def test_the_process_that_supervises_workers_loads_no_torch(
    table: Path, tmp_path: Path, folders: dict[str, Path]
) -> None:
    script = """
import sys
from batch_infer.__main__ import main

if __name__ == "__main__":
    try:
        main()
    finally:
        print(sorted({"torch", "diffusers", "transformers"} & sys.modules.keys()), file=sys.stderr)
"""
    file = tmp_path / "supervise.py"
    file.write_text(script, "utf-8")
    options = ("--model", folders["flux"], "--num-processes", "1", "--steps", "2", "--height", "64", "--width", "64")
    run_it: list[Any] = [sys.executable, file, "run", table, "--out", tmp_path / "out", *options]
    done = subprocess.run(run_it, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert sum(item["status"] == "ok" for item in results(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NothingPipeline", "has no pipeline NothingPipeline"),
        ("AutoencoderKL", "has no pipeline AutoencoderKL"),
        ("FluxControlPipeline", "FluxControlPipeline needs inputs other than text: control_image"),
        ("StableDiffusionControlNetPipeline", "needs inputs other than text: controlnet"),
        ("StableDiffusionImg2ImgPipeline", "is not text-to-image: its __call__ has no height, width"),
        ("FluxImg2ImgPipeline", "FluxImg2ImgPipeline needs inputs other than text: image"),
        ("FluxFillPipeline", "needs inputs other than text"),
        ("KandinskyV22Pipeline", "is not text-to-image: its __call__ has no prompt"),
        ("WuerstchenPriorPipeline", "WuerstchenPriorPipeline is not text-to-image"),
        ("WanPipeline", "is not text-to-image: its __call__ has no num_images_per_prompt"),
        ("LattePipeline", "is not text-to-image"),
    ],
)
def test_classes_that_are_not_text_to_image_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        find_class(name)


def test_a_class_whose_library_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Needy:
        """Like diffusers' placeholder for a class whose library is missing."""

        _backends = ("torch", "tachyons")

    monkeypatch.setattr(diffusers, "NeedyPipeline", Needy, raising=False)
    with pytest.raises(ModelError, match="NeedyPipeline needs tachyons: pip install tachyons"):
        find_class("NeedyPipeline")


def add_code(folder: Path, library: str, file: str) -> None:
    (folder / "transformer" / file).write_text("raise SystemExit('ran')", "utf-8")
    amend(folder / "model_index.json", transformer=[library, "FluxTransformer2DModel"])


def pickle_weights(folder: Path) -> None:
    file = folder / "text_encoder_2" / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "code next to its component": (lambda f: add_code(f, "mine", "mine.py"), "transformer is .*only classes of"),
    "code with the name of a library": (
        lambda f: add_code(f, "diffusers", "diffusers.py"), "transformer/diffusers.py is code",
    ),
    "code with the name of a pipeline": (lambda f: add_code(f, "flux", "flux.py"), "transformer/flux.py is code"),
    "a relative library": (lambda f: amend(f / "model_index.json", vae=["..flux", "X"]), "only classes of"),
    "an unknown class": (
        lambda f: amend(f / "model_index.json", vae=["diffusers", "Nothing"]), "vae is a Nothing, which this version",
    ),
    "an unknown pipeline": (
        lambda f: amend(f / "model_index.json", _class_name="NothingPipeline"), "has no pipeline NothingPipeline",
    ),
    "a missing component": (lambda f: amend(f / "model_index.json", vae=None), "could not be loaded: .*expected"),
    "pickles": (pickle_weights, "text_encoder_2/pytorch_model.bin is pickled"),
    "no vocabulary": (lambda f: (f / "tokenizer_2" / "tokenizer.json").unlink(), "tokenizer_2/ has none of tokenizer"),
    "no folder": (lambda f: shutil.rmtree(f / "vae"), "names vae/, which is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_damaged_folders_are_refused(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    copy = copy_folder(folders["flux"], tmp_path)
    damage, reason = FAULTS[case]
    damage(copy)
    with pytest.raises(ModelError, match=reason) as exc_info:
        card_of(copy)
    assert "\n" not in str(exc_info.value)


def test_missing_weights_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = copy_folder(folders["z_image"], tmp_path)
    file = copy / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights.pop("layers.0.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"text_encoder lacks 1 tensor \(layers.0.mlp.up_proj.weight\)"):
        load_model(copy)


def test_layers_that_overflow_in_float16_stay_in_float32(folders: dict[str, Path]) -> None:
    """As in diffusers: T5 keeps the last projection of its blocks in float32."""
    model = AnyPipeline.load(card_of(folders["flux"]), CPU, torch.float16, with_checker=False)
    encoder = model.pipeline.text_encoder_2
    assert encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert encoder.shared.weight.dtype == model.pipeline.transformer.dtype == torch.float16


# The commands


def flux_run(table: Path, out: Path, folders: dict[str, Path], *options: str | Path) -> CommandResult:
    return run(table, out, "--model", folders["flux"], "--height", "64", "--width", "64", *options)


TABLE: list[list[Any]] = [
    ["id", "prompt", "num_inference_steps", "guidance_scale", "num_images_per_prompt", "negative_prompt", "width"],
    ["a", "a red circle", 3, "", 2, "", ""],
    ["b", "two blue squares", "", 2.5, 1, "", ""],
    ["c", "a green star", 3, "", 1, "", 96],
    ["d", "a ring", "", 1.0, 1, "green", ""],
    ["e", "a ring", "", 1.0, 1, "", 65],
    ["f", "and more " * 30, 3, "", 1, "", ""],
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", TABLE)


def test_a_run_accounts_for_every_row(table: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    out = tmp_path / "out"
    assert flux_run(table, out, folders).code == 3
    assert_whole(out)
    rows = results(out)
    assert [(item["id"], item["status"]) for item in rows] == [
        ("a", "ok"), ("a", "ok"), ("b", "ok"), ("c", "ok"), ("d", "invalid"), ("e", "invalid"), ("f", "ok"),
    ]  # fmt: skip
    errors = {item["id"]: item["error"] for item in rows if item["error"]}
    assert errors["d"] == "negative_prompt 'green' is given, but this model does not support it"
    assert "width 65 is not a multiple of 16" in errors["e"]
    rendered_rows = [item for item in rows if item["status"] == "ok"]
    assert {item["scheduler"] for item in rendered_rows} == {"FlowMatchEulerDiscreteScheduler"}
    assert {item["nsfw_content_detected"] for item in rendered_rows} == {None}
    assert {item["prompt_truncated"] for item in rendered_rows} == {None}
    assert all(item["prompt_tokens"] > 0 for item in rendered_rows)
    assert [item["guidance_scale"] for item in rendered_rows] == [3.5, 3.5, 2.5, 3.5, 3.5]
    assert run_json(out)["model"]["family"] == "any_pipeline"
    assert not run_json(out)["compute"]["compiled"]


@pytest.mark.promises
def test_a_continued_run_has_the_same_bytes(table: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    single_run, parts = tmp_path / "whole", tmp_path / "parts"
    flux_run(table, single_run, folders)
    for limit in ("1", "3", "6"):
        flux_run(table, parts, folders, "--limit", limit)
    assert hashes(parts) == hashes(single_run)
    before = {item["id"]: item["finished_at"] for item in results(parts)}
    flux_run(table, parts, folders)
    assert {item["id"]: item["finished_at"] for item in results(parts)} == before


@pytest.mark.promises
@pytest.mark.parametrize("name", ["flux", "pixart", "z_image"])
def test_a_killed_a_shuffled_and_a_split_run_have_the_same_bytes(
    tmp_path: Path, folders: dict[str, Path], name: str
) -> None:
    header = ["id", "prompt", "num_inference_steps", "guidance_scale"]
    rows = [[f"row {k}", "a red circle " * (1 + k % 4), 4 + k % 9, 1.5 + k % 3] for k in range(72)]
    height, width = map(str, SIZES.get(name, (64, 64)))
    options = ("--model", str(folders[name]), "--height", height, "--width", width)  # rendered in this process
    outs = {word: tmp_path / word for word in ("whole", "killed", "shuffled", "split")}
    tables = {word: write_csv(tmp_path / f"{word}.csv", [header, *rows]) for word in ("whole", "killed")}
    tables["shuffled"] = write_csv(tmp_path / "shuffled.csv", [header, *random.Random(0).sample(rows, len(rows))])
    assert run(tables["whole"], outs["whole"], *options).code == 0
    killed = tables["killed"], outs["killed"], *options, "--num-processes", "1"
    with start(*killed, program=MODULE, session=True, PACE_HOLD="8") as process:
        assert wait_for(process, lambda: any((outs["killed"] / "manifest").glob("part-*")))
        os.killpg(process.pid, signal.SIGKILL)
    done = len(list((outs["killed"] / "images").rglob("*.png")))
    assert run(tables["killed"], outs["killed"], *options).code == 0
    assert 0 < done < len(rows)
    assert run(tables["shuffled"], outs["shuffled"], *options).code == 0
    parts = [write_csv(tmp_path / f"{k}.csv", [header, *rows[k::2]]) for k in range(2)]
    assert command("run", *parts, "--out", outs["split"], *QUICK, *options).code == 0
    expected = images_of(outs["whole"])
    assert len(expected) == len(rows)
    for word in ("killed", "shuffled", "split"):
        assert images_of(outs[word]) == expected, word


def images_of(out: Path) -> dict[str, str]:
    return {item["id"]: item["sha256"] for item in results(out) if item["status"] == "ok"}


@pytest.mark.promises
@pytest.mark.usefixtures("probe_here")
def test_a_plan_matches_the_run(table: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    options = ("--slots", "8", "--threads", "1", "--device", "cpu", "--steps", "2", "--height", "64", "--width", "64")
    model = ("--model", folders["flux"])
    plan = json.loads(command("plan", table, "--out", tmp_path / "out", *options, *model, "--json").stdout)
    result = json.loads(flux_run(table, tmp_path / "out", folders, "--json").stdout)
    assert plan["row_forwards"] == result["row_forwards"] == 3 * 2 + 2 * 1 + 3 * 1 + 3 * 1
    assert plan["ticks"] == result["ticks"]
    assert plan["occupancy"] == pytest.approx(result["occupancy"], abs=1e-3)
    assert plan["truncated"] is None
    errors = [(fault["id"], fault["error"]) for fault in plan["invalid_results"]]
    rows = results(tmp_path / "out")
    assert errors == [(item["id"], item["error"]) for item in rows if item["status"] == "invalid"]


def test_unsupported_options_are_refused(table: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    for options, message in {
        ("--negative-prompt", "green"): "negative_prompt 'green' is given, but this model does not support it",
        ("--guidance-rescale", "0.7"): "guidance_rescale '0.7' is given, but this model does not support it",
    }.items():
        result = flux_run(table, tmp_path / "out", folders, *options)
        assert result.code == 2
        assert message in result.stderr


def test_steps_that_the_pipeline_refuses_are_invalid(tmp_path: Path, folders: dict[str, Path]) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt", "num_inference_steps"], ["x", 3], ["x", 5], ["y", 3]])
    options = ("--model", folders["perturbed"], "--scheduler", "PNDMScheduler:skip_prk_steps=false")
    assert run(table, tmp_path / "out", *options, "--safety", "none").code == 3
    rows = results(tmp_path / "out")
    assert [item["status"] for item in rows] == ["invalid", "ok", "invalid"]
    assert rows[0]["error"].startswith("StableDiffusionPAGPipeline does not support this row: ")


@pytest.mark.parametrize(("safety", "is_checked"), [("auto", True), ("none", False)])
def test_the_checkpoints_checker_is_used(
    tmp_path: Path, folders: dict[str, Path], safety: str, is_checked: bool
) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt", "seed"], *(["a red circle", k] for k in range(6))])
    assert run(table, tmp_path / "out", "--model", folders["perturbed"], "--safety", safety).code == 0
    rows = results(tmp_path / "out")
    assert all((item["nsfw_content_detected"] is not None) == is_checked for item in rows)
    assert {item["safety_checker"] for item in rows} == ({"stable_diffusion"} if is_checked else {None})
