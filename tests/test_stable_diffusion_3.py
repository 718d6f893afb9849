"""Stable Diffusion 3 with step-level batching: images compared with diffusers' calls, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from batch_infer.chain import BatchSizes, RenderedImage, StepLevelChain
from batch_infer.errors import ModelError
from batch_infer.models import AnyPipeline, load_latent_diffusion, load_solver, load_token_counter, read_card
from batch_infer.records import PromptRequest, SizeRules
from batch_infer.settings import ModelSettings
from tests.checkpoints import amend
from tests.oracle import assert_parity, call_diffusers
from tests.pipelines import save_sd3
from tests.rendering import CPU, copy_folder, load_family, make_request, max_difference, render
from tests.runs import assert_whole, results, run, run_json
from tests.tables import write_csv

ROWS = (
    make_request("unguided", "a red circle", steps=4, guidance=1.0, seed=1),
    make_request("guided", "two blue squares", steps=6, guidance=7.0, seed=2),
    make_request("negative", "a star", steps=5, guidance=3.5, negative="green", seed=3),
    make_request("empty", "", steps=5, negative="", seed=4),
    make_request("wide", "a ring", steps=4, size=(64, 96), seed=5),
    make_request("long", "a small star and " * 40, steps=4, negative="a ring, " * 60, seed=6),
    make_request("one step", "a heart", steps=1, seed=2**63 - 1),
)


@pytest.fixture(scope="module", params=[True, False], ids=["with T5", "without T5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3") / "sd3", with_t5=request.param)


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3") / "whole")


@pytest.fixture
def copy(sd3_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to modify."""
    return copy_folder(sd3_folder, tmp_path)


def load_reference(folder: Path) -> Any:
    absent = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_batched_rows_match_diffusers(folder: Path) -> None:
    assert_parity(load_reference(folder), load_family(folder), ROWS)


def test_another_flow_matching_scheduler_matches_diffusers(sd3_folder: Path) -> None:
    request, pipe = make_request(steps=5), load_reference(sd3_folder)
    before = call_diffusers(pipe, request)[0]
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = call_diffusers(pipe, request)[0]
    assert max_difference(before, expected) > 2
    model = load_family(sd3_folder, "FlowMatchHeunDiscreteScheduler")
    assert max_difference(render(model, [request])["row"].pixels, expected) <= 1


def test_an_image_depends_only_on_its_row(sd3_folder: Path) -> None:
    """Its bytes are the same alone and among other rows in any order, with any texts, steps and guidance."""
    model = load_family(sd3_folder)
    crowd = [
        make_request(f"crowd {k}", f"{k} rings " * (k * k), steps=3 + k % 3, guidance=1 + k % 3, seed=k)
        for k in range(6)
    ]
    alone = {row.id: render(model, [row])[row.id].pixels for row in ROWS}
    for order in ([*ROWS, *crowd], [*crowd[:3], *ROWS[::-1], *crowd[3:]]):
        together = render(model, sorted(order, key=lambda row: row.params.width))
        for name, image in alone.items():
            assert np.array_equal(together[name].pixels, image), name


def test_every_text_encoder_changes_the_image(sd3_folder: Path, copy: Path) -> None:
    before = render(load_family(sd3_folder), [make_request()])["row"].pixels
    for component in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        file = copy / component / "model.safetensors"
        weights = load_file(file)
        originals = {name: weight.clone() for name, weight in weights.items()}
        weights[next(name for name in weights if "embed" in name or "shared" in name)].mul_(-1)
        save_file(weights, file, metadata={"format": "pt"})
        assert max_difference(render(load_family(copy), [make_request()])["row"].pixels, before) > 0, component
        save_file(originals, file, metadata={"format": "pt"})


def test_guidance_rescale_is_supported(sd3_folder: Path) -> None:
    model = load_family(sd3_folder)
    plain, rescaled = (render(model, [make_request(rescale=rescale)])["row"].pixels for rescale in (0.0, 0.7))
    assert max_difference(plain, rescaled) > 2


def test_the_card(folder: Path) -> None:
    card = read_card(ModelSettings(name=str(folder)))
    assert (card.family, card.num_inference_steps, card.guidance_scale) == ("stable_diffusion_3", 28, 7.0)
    assert card.sizes == SizeRules(64, 64, 16, 16, 192)
    assert card.sizes.max_side == 192
    assert (card.has_checker, card.embedded_guidance, card.unsupported_fields) == (False, False, ())
    assert load_solver(card).table(5).evaluations == 5
    counter = load_token_counter(card)
    assert counter is not None
    (condition,) = load_family(folder).condition([make_request(prompt="a red circle")])
    assert (condition.prompt_tokens, condition.prompt_truncated) == (counter.count(["a red circle"])[0], False)


def test_a_schedule_that_depends_on_the_size_uses_the_pipeline_call(folder: Path, tmp_path: Path) -> None:
    copy = copy_folder(folder, tmp_path)
    amend(copy / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    card = read_card(ModelSettings(name=str(copy)))
    assert card.uses_pipeline_call
    assert (card.num_inference_steps, card.guidance_scale) == (28, 7.0)
    request, model = make_request(), AnyPipeline.load(card, CPU, torch.float32, with_checker=False)
    (outcome,) = StepLevelChain(model, BatchSizes(4, 2), None).render([request])
    assert isinstance(outcome, RenderedImage)
    assert max_difference(outcome.pixels, call_diffusers(load_reference(copy), request)[0]) <= 1


def test_layers_that_overflow_in_float16_stay_in_float32(sd3_folder: Path) -> None:
    card = read_card(ModelSettings(name=str(sd3_folder)))
    model: Any = load_latent_diffusion(card, CPU, torch.float16, with_checker=False)
    encoder = model.pipeline.text_encoder_3
    assert encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert {network.dtype for network in (encoder, model.pipeline.transformer, model.pipeline.vae)} == {torch.float16}
    (condition,) = model.condition([make_request()])
    context = condition.context[0]
    assert {part.dtype for part in context.values()} == {torch.float16}
    assert all(torch.isfinite(part).all() for part in context.values())


def test_a_transformer_with_other_channels_is_refused(copy: Path) -> None:
    amend(copy / "transformer" / "config.json", in_channels=8)
    with pytest.raises(ModelError, match="has 8 input and 4 output channels, so it is not a text-to-image checkpoint"):
        load_family(copy)


def test_the_command_renders_a_table(tmp_path: Path, sd3_folder: Path) -> None:
    rows: list[list[Any]] = [["id", "prompt", "num_inference_steps", "guidance_scale", "width"]]
    rows += [["a", "a red circle", 2, 1.0, ""], ["b", "a star", 4, "", ""], ["c", "a ring", "", "", 96]]
    rows += [["d", "a ring", "", "", 208], ["e", "a ring", "", "", 72]]
    out = tmp_path / "out"
    assert run(write_csv(tmp_path / "t.csv", rows), out, "--model", sd3_folder).code == 3
    assert_whole(out)
    stored = results(out)
    assert [item["status"] for item in stored] == ["ok", "ok", "ok", "invalid", "invalid"]
    assert "width '208' is not within 16 to 192" in stored[3]["error"]
    assert {item["nsfw_content_detected"] for item in stored} == {None}
    assert stored[1]["guidance_scale"] == 7.0
    assert run_json(out)["model"]["family"] == "stable_diffusion_3"
    alone = render(load_family(sd3_folder), [request_from(stored[1])], slots=8, decode=4)["b"]
    assert np.array_equal(np.asarray(Image.open(out / stored[1]["generated_image"])), alone.pixels)


def request_from(row: dict[str, Any]) -> PromptRequest:
    """Rebuild the request of a result row."""
    params = {"steps": row["num_inference_steps"], "guidance": row["guidance_scale"], "seed": row["seed"]}
    return make_request(row["id"], row["prompt"], size=(row["height"], row["width"]), **params)
