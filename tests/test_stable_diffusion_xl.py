"""Stable Diffusion XL: the inputs of each row, and checkpoints."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from batch_infer.errors import ModelError
from batch_infer.models import load_latent_diffusion, load_solver, load_token_counter, read_card
from batch_infer.models.stable_diffusion_xl import StableDiffusionXL
from batch_infer.records import SizeRules
from batch_infer.settings import ModelSettings
from tests.checkpoints import amend, make_unet
from tests.checkpoints_xl import UNET
from tests.oracle import assert_close, assert_parity, call_diffusers, load_pipeline, with_scheduler
from tests.rendering import CPU, copy_folder, load_family, make_request, max_difference, render
from tests.runs import results, run

FULL_SIZE: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The UNet of Stable Diffusion XL 1.0."""
NEGATIVES = (
    make_request("none", "a red circle", steps=4, seed=1),
    make_request("empty", "a red circle", steps=4, negative="", seed=1),
    make_request("text", "a red circle", steps=4, negative="green", seed=1),
    make_request("unguided", "a red circle", steps=4, guidance=1.0, negative="green", seed=1),
)
"""Rows that differ only in negative prompt and guidance."""


@pytest.fixture
def copy(sdxl_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to modify."""
    return copy_folder(sdxl_folder, tmp_path)


@pytest.fixture(scope="module")
def sdxl(sdxl_folder: Path) -> Any:
    return load_family(sdxl_folder)


def card_of(folder: Path, **settings: Any) -> Any:
    return read_card(ModelSettings(name=str(folder), **settings))


# Rows


def test_no_negative_prompt_differs_from_an_empty_one(sdxl: Any, sdxl_folder: Path) -> None:
    assert_parity(load_pipeline(sdxl_folder), sdxl, NEGATIVES)
    none, empty, text, unguided = sdxl.condition(NEGATIVES)
    assert not any(none.context[1][name].any() for name in ("encoder_hidden_states", "text_embeds"))
    assert none.context[1]["time_ids"].tolist() == [64, 64, 0, 0, 64, 64]
    assert empty.context[1]["text_embeds"].any()
    assert text.context[1]["text_embeds"].any()
    assert unguided.context[1] is None


def test_a_missing_negative_prompt_is_empty_if_the_checkpoint_requires_it(copy: Path) -> None:
    amend(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    rendered, pipe = render(load_family(copy), NEGATIVES), load_pipeline(copy)
    for row in NEGATIVES:
        assert_close(rendered[row.id].pixels, call_diffusers(pipe, row)[0])
    assert np.array_equal(rendered["none"].pixels, rendered["empty"].pixels)


def test_embeddings_equal_those_of_the_pipeline(sdxl: Any, sdxl_folder: Path) -> None:
    pipe = load_pipeline(sdxl_folder)
    (conditioning,) = sdxl.condition([make_request(prompt="a red circle", negative="green", size=(48, 80))])
    expected = pipe.encode_prompt("a red circle", device="cpu", negative_prompt="green")
    for part, embedding, pooled in zip(conditioning.context, expected[:2], expected[2:], strict=True):
        assert torch.allclose(part["encoder_hidden_states"], embedding[0], atol=1e-6)
        assert torch.allclose(part["text_embeds"], pooled[0], atol=1e-6)
        assert part["time_ids"].tolist() == [48, 80, 0, 0, 48, 80]


@pytest.mark.parametrize("name", ["sdxl", "sdxl_turbo"])
def test_a_rows_bytes_do_not_depend_on_its_neighbours(name: str, request: pytest.FixtureRequest) -> None:
    """This also holds for SDXL Turbo, whose sampler draws noise at every step."""
    model = load_family(request.getfixturevalue(f"{name}_folder"))
    row = make_request("row", "a small star", steps=4, negative="green", seed=3)
    expected = render(model, [row])["row"].pixels
    others = [make_request(str(k), f"{k} circles", steps=2 + k, guidance=k % 3, seed=k) for k in range(7)]
    assert np.array_equal(render(model, [*others[:3], row, *others[3:]])["row"].pixels, expected)


def test_turbo_takes_few_steps_without_guidance(sdxl_turbo_folder: Path) -> None:
    rows = tuple(
        make_request(f"{steps}", "a red circle", steps=steps, guidance=guidance, seed=steps)
        for steps, guidance in ((1, 0.0), (2, 0.0), (3, 1.0), (4, 0.0))
    )
    assert_parity(load_pipeline(sdxl_turbo_folder), load_family(sdxl_turbo_folder), rows)


def test_steps_that_share_a_timestep_are_distinguished(sdxl_folder: Path) -> None:
    """Unlike the pipeline of Stable Diffusion, this one sets the begin index, so it supports more such steps."""
    scheduler = "DPMSolverMultistepScheduler:use_beta_sigmas=true"
    rows = (make_request("row", steps=50, seed=1), make_request("other", steps=6))
    assert_parity(with_scheduler(load_pipeline(sdxl_folder), scheduler), load_family(sdxl_folder, scheduler), rows)


def test_a_distilled_guidance_scale_is_an_input(copy: Path) -> None:
    make_unet(**UNET, time_cond_proj_dim=16).save_pretrained(copy / "unet")
    model = load_family(copy)
    requests = (
        make_request("one", steps=4, guidance=1.0),
        make_request("eight", steps=4, guidance=8.0, negative="green"),
    )
    rows = tuple(replace(row, params=replace(row.params, embedded_guidance=True)) for row in requests)
    assert card_of(copy).embedded_guidance
    assert_parity(load_pipeline(copy), model, rows)
    assert {conditioning.context[1] for conditioning in model.condition(rows)} == {None}


def test_a_prompt_is_truncated_if_either_encoder_truncates_it(copy: Path) -> None:
    """The second tokenizer has no merges and splits each word into letters."""
    path = copy / "tokenizer_2" / "tokenizer.json"
    words = json.loads(path.read_text("utf-8"))
    words["model"]["merges"] = []
    path.write_text(json.dumps(words), "utf-8")
    texts = ["circle", "circle " * 12, "circle " * 13]
    conditionings = load_family(copy).condition([make_request(prompt=text) for text in texts])
    assert [(row.prompt_tokens, row.prompt_truncated) for row in conditionings] == [(6, False), (72, False), (78, True)]
    counter = load_token_counter(card_of(copy))
    assert counter is not None
    assert (counter.count(texts), counter.max_tokens) == ([6, 72, 78], 75)


# Checkpoints


def test_the_card(sdxl_folder: Path) -> None:
    card = card_of(sdxl_folder)
    assert (card.family, card.pipeline) == ("stable_diffusion_xl", "StableDiffusionXLPipeline")
    assert (card.num_inference_steps, card.guidance_scale, card.guidance_rescale) == (50, 5.0, 0.0)
    assert card.sizes == SizeRules(64, 64, 8, 16)
    assert not card.has_checker
    assert load_solver(card).name == "EulerDiscreteScheduler"


def test_the_fingerprint_depends_on_both_encoders_and_on_the_missing_negative_prompt(copy: Path) -> None:
    before = card_of(copy).fingerprint
    index = copy / "model_index.json"
    amend(index, force_zeros_for_empty_prompt=None)
    assert card_of(copy).fingerprint == before, "True is the default"
    amend(index, force_zeros_for_empty_prompt=False)
    assert card_of(copy).fingerprint != before
    amend(index, force_zeros_for_empty_prompt=True)
    amend(copy / "text_encoder_2" / "config.json", note="changed")
    assert card_of(copy).fingerprint != before


def test_latents_are_normalized_as_the_vae_config_says(copy: Path) -> None:
    row = (make_request("row", steps=4), make_request("other", steps=4, seed=1))
    plain = render(load_family(copy), row)["row"].pixels
    amend(copy / "vae" / "config.json", latents_mean=[-1.6, 1.4, 0.4, -0.1], latents_std=[8.4, 6.0, 3.0, 5.0])
    model = load_family(copy)
    assert_parity(load_pipeline(copy), model, row)
    assert max_difference(render(model, row)["row"].pixels, plain) > 2


def test_a_decoder_that_overflows_in_float16_decodes_in_float32(copy: Path) -> None:
    StableDiffusionXLPipeline.from_pretrained(copy, dtype=torch.float16, add_watermarker=False).save_pretrained(
        copy, variant="fp16"
    )
    for file in copy.glob("*/*.safetensors"):
        if ".fp16." not in file.name:
            file.unlink()
    model: Any = load_latent_diffusion(card_of(copy, variant="fp16"), CPU, torch.float16, with_checker=False)
    assert {weight.dtype for weight in model.networks[0].parameters()} == {torch.float16}
    assert {weight.dtype for weight in model.networks[1].parameters()} == {torch.float32}
    assert model.pipeline.vae.dtype == torch.float16, "diffusers' pipeline itself converts it at every call"
    latents = torch.randn(2, 4, 8, 8)
    image = model.decode(latents)
    assert image.dtype == torch.float32
    expected = model.pipeline.vae.to(torch.float32).decode(latents / 0.13025, return_dict=False)[0]
    assert torch.equal(image, expected / 2 + 0.5)
    assert render(model, [make_request("row", steps=2)])["row"].pixels.std() > 1
    amend(copy / "vae" / "config.json", force_upcast=False)
    fixed: Any = load_latent_diffusion(card_of(copy, variant="fp16"), CPU, torch.float16, with_checker=False)
    assert {weight.dtype for weight in fixed.networks[1].parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "Img2Img"),
        ({"text_encoder": [None, None], "tokenizer": [None, None]}, "names no text_encoder, tokenizer"),
        ({"text_encoder_2": [None, None]}, "names no text_encoder_2"),
    ],
)
def test_only_base_checkpoints_are_accepted(copy: Path, changed: dict[str, Any], reason: str) -> None:
    """A refiner starts from an image and has only the second encoder."""
    amend(copy / "model_index.json", **changed)
    with pytest.raises(ModelError, match=reason) as exc_info:
        card_of(copy)
    assert "\n" not in str(exc_info.value)


@pytest.mark.parametrize(
    ("unet", "reason"),
    [
        ({"projection_class_embeddings_input_dim": 64}, "takes 64 numbers .* takes 72; is it a refiner?"),
        ({"addition_embed_type": None}, "addition_embed_type=None is not Stable Diffusion XL"),
        ({"in_channels": 9}, "has 9 input and 4 output channels"),
    ],
)
def test_other_unets_are_refused(copy: Path, unet: dict[str, Any], reason: str) -> None:
    make_unet(**UNET | unet).save_pretrained(copy / "unet")
    with pytest.raises(ModelError, match=reason):
        load_family(copy)


@pytest.mark.promises
def test_the_published_unet_has_these_parameters_and_flops() -> None:
    """The released network has 2567.5M parameters and takes 6.76 TFLOP per row at 1024x1024 pixels."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SIZE).eval()
        context = {
            "encoder_hidden_states": torch.empty(1, 77, 2048),
            "text_embeds": torch.empty(1, 1280),
            "time_ids": torch.empty(1, 6),
        }
        sample, timestep = torch.empty(1, 4, 128, 128), torch.empty(1)
    assert sum(weight.numel() for weight in unet.parameters()) == 2_567_463_684
    with FlopCounterMode(display=False) as counter:
        StableDiffusionXL.denoise(SimpleNamespace(denoiser=unet), sample, timestep, context)  # type: ignore[arg-type]
    assert round(counter.get_total_flops() / 1e12, 2) == 6.76


def test_the_command_renders_a_table(sdxl_folder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "none", "prompt": "a red circle", "negative_prompt": "", "seed": 1, "guidance_scale": 5},
        {"id": "text", "prompt": "a red circle", "negative_prompt": "green", "seed": 1, "guidance_scale": 7.5},
        {"id": "wide", "prompt": "two stars", "negative_prompt": "", "seed": 2, "guidance_scale": 1, "width": 96},
    ]
    table, out = tmp_path / "table.csv", tmp_path / "out"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["id", "prompt", "negative_prompt", "seed", "guidance_scale", "width"])
        writer.writeheader()
        writer.writerows(rows)
    result = run(table, out, "--model", sdxl_folder, "--steps", "3")
    assert result.code == 0, result.stderr
    rendered = {row["id"]: row for row in results(out)}
    assert {row["status"] for row in rendered.values()} == {"ok"}
    assert {row["nsfw_content_detected"] for row in rendered.values()} == {None}
    pipe = load_pipeline(sdxl_folder)
    for row in rows:
        request = make_request(
            prompt=row["prompt"], negative=row["negative_prompt"] or None, seed=row["seed"], steps=3,
            guidance=row["guidance_scale"], size=(64, row.get("width", 64)),
        )  # fmt: skip
        image = np.asarray(Image.open(out / rendered[row["id"]]["generated_image"]))
        assert_close(image, call_diffusers(pipe, request)[0])
