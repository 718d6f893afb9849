"""Latent consistency models: few steps, and the guidance scale as an input of the UNet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from batch_infer.errors import ModelError, RowError
from batch_infer.models import load_solver, read_card
from batch_infer.records import PromptRequest
from batch_infer.settings import ModelSettings
from tests.checkpoints import amend
from tests.oracle import assert_close, assert_parity, call_diffusers, load_pipeline
from tests.rendering import copy_folder, load_family, make_request, render
from tests.runs import results, run


def make_embedded_request(name: str, **request_options: Any) -> PromptRequest:
    """Return a request as parsed for a model with embedded guidance."""
    request = make_request(name, **request_options)
    return replace(request, params=replace(request.params, embedded_guidance=True))


ROWS = (
    make_embedded_request("one step", steps=1, guidance=8.5, seed=1),
    make_embedded_request("four", steps=4, guidance=8.5, seed=2),
    make_embedded_request("less guidance", steps=4, guidance=2.5, seed=2),
    make_embedded_request("no guidance", steps=4, guidance=1.0, seed=2),
    make_embedded_request("below one", steps=4, guidance=0.0, rescale=0.7, seed=2),
    make_embedded_request("negative", steps=8, guidance=8.5, negative="green", seed=3),
    make_embedded_request("wide", prompt="two stars", steps=3, guidance=5.0, size=(48, 80), seed=4),
)


@pytest.fixture(scope="module")
def model(lcm_folder: Path) -> Any:
    return load_family(lcm_folder)


def test_the_card(lcm_folder: Path) -> None:
    card = read_card(ModelSettings(name=str(lcm_folder)))
    assert (card.family, card.pipeline) == ("stable_diffusion", "LatentConsistencyModelPipeline")
    assert (card.num_inference_steps, card.guidance_scale) == (4, 8.5)
    assert card.embedded_guidance


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("kind", ["LatentConsistencyModelPipeline", "StableDiffusionPipeline"])
def test_rows_match_both_pipelines(model: Any, lcm_folder: Path, kind: str) -> None:
    pipe = load_pipeline(lcm_folder)
    if kind == "StableDiffusionPipeline":
        pipe = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == kind
    assert_parity(pipe, model, ROWS)


def test_rows_take_one_slot_and_encode_no_negative_prompt(model: Any) -> None:
    assert {row.params.slots for row in ROWS} == {1}
    rows = model.condition(ROWS)
    assert {conditioning.context[1] for conditioning in rows} == {None}
    assert all(conditioning.context[0]["timestep_cond"].shape == (16,) for conditioning in rows)


def test_a_rows_bytes_do_not_depend_on_its_neighbours(model: Any) -> None:
    expected = render(model, ROWS[1:2])["four"].pixels
    assert np.array_equal(render(model, ROWS)["four"].pixels, expected)


def test_the_scheduler_config_is_not_corrected(lcm_folder: Path, tmp_path: Path) -> None:
    """StableDiffusionPipeline corrects old settings. This pipeline does not, so its scheduler would clip."""
    folder = copy_folder(lcm_folder, tmp_path)
    amend(folder / "scheduler" / "scheduler_config.json", clip_sample=True)
    for load in (load_family, lambda path: load_solver(read_card(ModelSettings(name=str(path))))):
        with pytest.raises(ModelError, match="LCMScheduler with clip_sample=true is not supported"):
            load(folder)


def test_more_steps_than_in_the_distillation_are_refused(model: Any) -> None:
    assert model.solver.table(50).evaluations == 50
    with pytest.raises(RowError, match="LCMScheduler does not take num_inference_steps=51"):
        model.solver.table(51)


def test_the_command_renders_a_table(lcm_folder: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "table.csv", tmp_path / "out"
    table.write_text("id,prompt,seed,guidance_scale\na,a red circle,1,\nb,a red circle,1,2\n", "utf-8")
    result = run(table, out, "--model", lcm_folder, "--steps", "4")
    assert result.code == 0, result.stderr
    rows = {row["id"]: row for row in results(out)}
    assert [rows[name]["guidance_scale"] for name in "ab"] == [8.5, 2.0]
    pipe = load_pipeline(lcm_folder)
    for name in "ab":
        request = make_request(seed=1, steps=4, guidance=rows[name]["guidance_scale"])
        assert_close(np.asarray(Image.open(out / rows[name]["generated_image"])), call_diffusers(pipe, request)[0])


def test_an_unsupported_negative_prompt_is_reported(lcm_folder: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "table.csv", tmp_path / "out"
    table.write_text("id,prompt,negative_prompt\na,a red circle,\nb,a red circle,green\n", "utf-8")
    assert run(table, out, "--model", lcm_folder, "--steps", "4").code == 3
    rows = {row["id"]: row for row in results(out)}
    assert (rows["a"]["status"], rows["b"]["status"]) == ("ok", "invalid")
    assert rows["b"]["error"] == "negative_prompt 'green' is given, but this model does not support it"
