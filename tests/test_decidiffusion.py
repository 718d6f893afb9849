"""DeciDiffusion: its architecture, its checkpoint, and its images compared with a reference implementation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from batch_infer.errors import ModelError
from batch_infer.models import load_latent_diffusion, load_solver, load_token_counter, read_card
from batch_infer.models.decidiffusion import FlexibleUNet, FlexibleUNetConfig
from batch_infer.records import SizeRules
from batch_infer.settings import ModelSettings
from tests import decidiffusion_reference
from tests.checkpoints import DECIDIFFUSION, OUTER, TINY_DECIDIFFUSION, amend
from tests.decidiffusion_reference import DOWN, LISTING, UP, ReferencePipeline, ReferenceUNet, alphas_bar, layers
from tests.rendering import CPU, copy_folder, load_family, make_request, max_difference, render
from tests.runs import assert_whole, command, hashes, results, run_json
from tests.tables import write_csv

CONFIG = "flexible_unet/config.json"
WEIGHTS = "flexible_unet/diffusion_pytorch_model.safetensors"
ROWS = (
    make_request("one", "a red circle", steps=1, guidance=7.5, rescale=0.7, seed=1),
    make_request("unguided", "a red circle", steps=4, guidance=1.0, rescale=0.7, seed=2),
    make_request("negative", "two blue squares", steps=7, guidance=7.5, negative="green", seed=3),
    make_request("rescaled", "two blue squares", steps=7, guidance=7.5, rescale=0.7, negative="green", seed=3),
    make_request("the defaults", "a small star", steps=30, guidance=7.5, rescale=0.7, seed=4),
    make_request("thirty, unguided", "a large ring", steps=30, guidance=1.0, seed=5),
    make_request("wide", "a red circle", steps=5, guidance=3.0, rescale=0.3, size=(64, 96), seed=6),
    make_request("odd at every level", "a purple heart", steps=4, guidance=7.5, rescale=0.7, size=(72, 88), seed=7),
)


def read_config(configurations: dict[str, Any]) -> FlexibleUNetConfig:
    return FlexibleUNetConfig.read({**OUTER, "configurations": configurations}, "here")


def build_on_meta(configurations: dict[str, Any]) -> FlexibleUNet:
    with torch.device("meta"):
        return FlexibleUNet(read_config(configurations)).eval()


@pytest.fixture(scope="module")
def published() -> FlexibleUNet:
    """The published model's UNet on the meta device, without weights."""
    return build_on_meta(DECIDIFFUSION)


@pytest.fixture(scope="module")
def model(decidiffusion_folder: Path) -> Any:
    return load_family(decidiffusion_folder)


@pytest.fixture(scope="module")
def reference(decidiffusion_folder: Path) -> ReferencePipeline:
    return ReferencePipeline.open(decidiffusion_folder)


@pytest.fixture
def copy(decidiffusion_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to modify."""
    return copy_folder(decidiffusion_folder, tmp_path)


# The architecture


def parameter_names(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def expected_shapes() -> dict[str, tuple[int, ...] | None]:
    """Map the tensor names of the published checkpoint to their shapes, or to None where no shape is compared."""
    stem = parameter_names("conv_in", "conv_out", "conv_norm_out", "time_embedding.linear_1", "time_embedding.linear_2")
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(stem)
    for sampler in (*(f"{block}.downsamplers.0.conv" for block in DOWN), "mid_block.upsamplers.0.conv"):
        shapes |= dict.fromkeys(parameter_names(sampler))
    for block in UP[:-1]:
        shapes |= dict.fromkeys(parameter_names(f"{block}.upsamplers.0.conv"))
    for block, listing in LISTING.items():
        width = int(re.findall(r">(\d+)", listing)[0])
        channels = iter(re.findall(r"R\((\d+)>(\d+)\)", listing))
        for kind, name in layers(block):
            if kind == "R":
                before, after = map(int, next(channels))
                shortcut = ["conv_shortcut"] if before != after else []
                parts = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", *shortcut)
                shapes |= dict.fromkeys(parameter_names(*(f"{name}.{part}" for part in parts)))
                shapes[f"{name}.conv1.weight"] = (after, before, 3, 3)
            else:
                inner = f"{name}.transformer_blocks.0"
                parts = ("norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2")
                shapes |= dict.fromkeys(parameter_names(f"{name}.norm", f"{name}.proj_in", f"{name}.proj_out"))
                shapes |= dict.fromkeys(parameter_names(*(f"{inner}.{part}" for part in parts)))
                shapes |= {f"{inner}.{attn}.to_{to}.weight": None for attn in ("attn1", "attn2") for to in "qkv"}
                shapes[f"{name}.proj_in.weight"] = shapes[f"{name}.proj_out.weight"] = (width, width, 1, 1)
                shapes[f"{inner}.attn2.to_k.weight"] = (width, 768)
    return shapes


def test_the_published_checkpoint_fits(published: FlexibleUNet) -> None:
    """Tests have no access to its weights, so they compare tensor names, some shapes, and the number of parameters."""
    tensors = published.state_dict()
    expected = expected_shapes()
    assert len(tensors) == 612
    assert sum(tensor.numel() for tensor in tensors.values()) == 814_746_884
    assert tensors.keys() == expected.keys()
    assert {name: tuple(tensors[name].shape) for name, shape in expected.items() if shape} == {
        name: shape for name, shape in expected.items() if shape
    }


def test_an_evaluation_has_the_published_flops(published: FlexibleUNet) -> None:
    """The count would be 0.610 TFLOP if the mid block ran its first resnet once.

    The test also shows that the UNet never synchronizes with the host, which would fail on the meta device.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        (output,) = published(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
    assert output.shape == (1, 4, 64, 64)
    assert counter.get_total_flops() == pytest.approx(0.614e12, rel=1e-3)


@pytest.fixture(scope="module")
def unets(decidiffusion_folder: Path) -> tuple[FlexibleUNet, ReferenceUNet]:
    """The tiny UNet and its reference implementation in float64, so that rounding does not hide errors."""
    family: Any = load_family(decidiffusion_folder)
    unet: FlexibleUNet = family.denoiser.double()
    return unet, ReferenceUNet(unet.state_dict(), heads=4)


def make_inputs(size: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sample, text = torch.randn(3, 4, *size, generator=random), torch.randn(3, 77, 32, generator=random)
    return sample.to(dtype), torch.tensor([999.0, 500.0, 0.0]), text.to(dtype)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (11, 13), (9, 8), (7, 18), (1, 2)], ids=str)
def test_the_unet_equals_the_reference(unets: tuple[FlexibleUNet, ReferenceUNet], size: tuple[int, int]) -> None:
    """The sizes include sides that are odd at each of the levels."""
    unet, reference_unet = unets
    arguments = make_inputs(size, torch.float64)
    with torch.inference_mode():
        actual, expected = unet(*arguments)[0], reference_unet(*arguments)
    assert actual.shape == arguments[0].shape
    assert 0.3 < expected.std() < 3
    assert (actual - expected).abs().max() < 1e-9


def test_the_unet_equals_the_reference_in_single_precision(model: Any, reference: ReferencePipeline) -> None:
    sample, timestep, text = make_inputs((8, 8), torch.float32)
    actual = model.denoise(sample, timestep, {"encoder_hidden_states": text})
    assert (actual - reference.unet(sample, timestep, text)).abs().max() < 1e-5


def test_unets_of_other_depths_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """This UNet has two levels and other numbers of layers per block than the published one."""
    keys = TINY_DECIDIFFUSION | {
        "down_blocks_in_channels": [32, 64],
        "down_blocks_out_channels": [64, 96],
        "down_blocks_num_attentions": [2, 0],
        "down_blocks_num_resnets": [1, 3],
        "add_downsample": [True, True],
        "mid_num_resnets": 0,
        "mid_num_attentions": 1,
        "prev_output_channels": [96, 96],
        "up_blocks_num_attentions": [1, 0],
        "up_blocks_num_resnets": [4, 2],
        "add_upsample": [True, False],
    }
    blocks = {"down_blocks.0": "RTT", "down_blocks.1": "RRR", "mid_block": "RT"}
    listing = blocks | {"up_blocks.0": "RTRRR", "up_blocks.1": "RR"}
    for name, value in (("LISTING", listing), ("DOWN", DOWN[:2]), ("UP", UP[:2])):
        monkeypatch.setattr(decidiffusion_reference, name, value)
    unet = FlexibleUNet(read_config(keys)).eval().double()
    arguments = make_inputs((6, 5), torch.float64)
    with torch.inference_mode():
        expected = ReferenceUNet(unet.state_dict(), heads=4)(*arguments)
        assert (unet(*arguments)[0] - expected).abs().max() < 1e-9


@pytest.mark.soak
def test_the_unet_compiles_into_one_graph(unets: tuple[FlexibleUNet, ReferenceUNet]) -> None:
    """The eager backend compiles quickly, and its output is exactly that of the uncompiled UNet."""
    unet, _ = unets
    arguments = make_inputs((9, 8), torch.float64)
    with torch.inference_mode():
        assert torch.equal(torch.compile(unet, backend="eager", fullgraph=True)(*arguments)[0], unet(*arguments)[0])


# config.json


@pytest.mark.parametrize("key", DECIDIFFUSION)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ModelError, match=f"^here: config.json .*{key}"):
        read_config({name: value for name, value in DECIDIFFUSION.items() if name != key})


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("temb_dim", "1280", "Expected `int`, got `str`"),
        ("temb_dim", True, "Expected `int`, got `bool`"),
        ("temb_dim", 0, "Expected `int` >= 1"),
        ("resnet_eps", None, "Expected `float`, got `null`"),
        ("resnet_eps", -1e-5, "Expected `float` > 0"),
        ("resnet_act_fn", "gelu", "'gelu' .* must be silu"),
        ("mix_block_in_forward", False, "False .* must be True"),
        ("num_attention_heads", 7, "down_blocks_in_channels.* and 7 attention heads"),
        ("down_blocks_in_channels", [], "Expected `array` of length >= 1"),
        ("down_blocks_in_channels", [320, 640, 640], "must be .320, 320, 640."),
        ("down_blocks_in_channels", [320, 320], "down_blocks_in_channels has 2 entries"),
        ("down_blocks_out_channels", [320, 640, 1000], "divisible by 32 groups"),
        ("down_blocks_num_attentions", [0, 1, 3.5], "Expected `int`, got `float`"),
        ("down_blocks_num_resnets", [2, 0, 1], "Expected `int` >= 1"),
        ("mid_num_attentions", -1, "Expected `int` >= 0"),
        ("prev_output_channels", [1280, 640, 320], "must be .1280, 1280, 640."),
        ("up_blocks_num_resnets", [3, 3, 3], "must be .2, 3, 3."),
        ("up_blocks_num_attentions", [6, 3], "3 entries"),
        ("add_downsample", [True, True, False], "must be .True, True, True."),
        ("add_upsample_mid_block", False, "must be True"),
        ("add_upsample", [True, True, True], "must be .True, True, False."),
        ("dropout", 0.1, "does not know that key"),
    ],
)  # fmt: skip
def test_an_invalid_key_is_named(key: str, value: object, reason: str) -> None:
    with pytest.raises(ModelError, match=f"^here: config.json (has|is invalid) .*{reason}") as exc_info:
        read_config(DECIDIFFUSION | {key: value})
    assert key in str(exc_info.value) or key in ("num_attention_heads", "down_blocks_in_channels")
    assert "\n" not in str(exc_info.value)


# The checkpoint


def test_the_card_has_the_models_own_defaults(decidiffusion_folder: Path) -> None:
    card = read_card(ModelSettings(name=str(decidiffusion_folder)))
    assert card.family == "decidiffusion"
    assert (card.num_inference_steps, card.guidance_rescale, card.guidance_scale) == (30, 0.7, 7.5)
    assert card.scheduler_name == "DDIMScheduler"
    assert card.has_checker
    assert card.sizes == SizeRules(native_height=64, native_width=64, side_multiple=8, min_side=64)
    counter = load_token_counter(card)
    assert counter is not None and counter.count(["a red circle"]) == [3]


def test_the_sampler_begins_at_pure_noise(decidiffusion_folder: Path) -> None:
    """The first sample contains only noise, so no term may be divided by the image's share of it, which is zero."""
    solver = load_solver(read_card(ModelSettings(name=str(decidiffusion_folder))))
    assert (solver.table(30).timesteps[0], solver.table(30).timesteps[-1]) == (999, 32)
    assert torch.isfinite(solver.table(30).coefficients).all()
    image, noise = alphas_bar()[749], 1 - alphas_bar()[749]
    assert alphas_bar()[999] == 0
    # Without the rescale to zero terminal SNR, the noise's share would be larger by 2e-5.
    assert solver.table(4).coefficients[0, :2].tolist() == pytest.approx([noise**0.5, -(image**0.5)], abs=3e-6)


def damage(copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(copy / WEIGHTS)
    change(weights)
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})


FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (
        lambda w: w.pop("mid_block.modules_list.6.conv1.bias"),
        r"lacks 1 tensor \(mid_block.modules_list.6.conv1.bias\)",
    ),
    "unexpected": (
        lambda w: w.update({"mid_block.modules_list.7.conv1.bias": torch.zeros(96)}),
        r"has 1 unexpected tensor \(mid_block.modules_list.7.conv1.bias\)",
    ),
    "named as in diffusers": (
        lambda w: w.update({"mid_block.resnets.0.conv1.bias": w.pop("mid_block.modules_list.0.conv1.bias")}),
        r"lacks 1 tensor \(mid_block.modules_list.0.conv1.bias\)",
    ),
    "misshapen": (
        lambda w: w.update({"conv_in.bias": torch.zeros(64)}),
        r"size mismatch for conv_in.bias: copying a param with shape torch.Size\(\[64\]\)",
    ),
    "empty": (dict.clear, r"lacks \d+ tensors"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_unmatched_tensors_are_named(copy: Path, case: str) -> None:
    change, reason = FAULTS[case]
    damage(copy, change)
    with pytest.raises(ModelError, match=reason) as exc_info:
        load_family(copy)
    assert str(copy / "flexible_unet") in str(exc_info.value)
    assert "\n" not in str(exc_info.value)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "describes a UNet2DConditionModel"),
        ({"configurations": None}, "does not define the image size"),
        ({"configurations": TINY_DECIDIFFUSION | {"temb_dim": 32}}, "size mismatch for time_embedding"),
        ({"configurations": TINY_DECIDIFFUSION | {"temb_dim": "wide"}}, "temb_dim"),
        ({"configurations": TINY_DECIDIFFUSION | {"mid_num_attentions": 1}}, r"lacks \d+ tensors \(mid_block"),
        ({"configurations": "none"}, "does not define the image size"),
    ],
)  # fmt: skip
def test_a_config_of_another_network_is_refused(copy: Path, values: dict[str, Any], reason: str) -> None:
    amend(copy / CONFIG, **values)
    with pytest.raises(ModelError, match=reason) as exc_info:
        load_family(copy)
    assert str(copy) in str(exc_info.value)


def test_shards_and_variants_are_loaded(copy: Path, model: Any) -> None:
    """The variant has two shards and an index. The default weights next to it are not loaded."""
    weights = load_file(copy / WEIGHTS)
    halves = list(weights)[::2], list(weights)[1::2]
    files = [f"diffusion_pytorch_model.fp16-0000{k}-of-00002.safetensors" for k in (1, 2)]
    for file, names in zip(files, halves, strict=True):
        save_file({name: weights[name] for name in names}, copy / "flexible_unet" / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, names in zip(files, halves, strict=True) for name in names}}
    (copy / "flexible_unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    damage(copy, lambda w: w["conv_out.bias"].add_(1))
    card = read_card(ModelSettings(name=str(copy), variant="fp16"))
    sharded = load_latent_diffusion(card, CPU, torch.float32, with_checker=False)
    request = make_request(steps=2, rescale=0.7)
    expected = render(model, [request])["row"].pixels
    assert np.array_equal(render(sharded, [request])["row"].pixels, expected)
    assert max_difference(render(load_family(copy), [request])["row"].pixels, expected) > 1
    (copy / "flexible_unet" / files[1]).unlink()
    with pytest.raises(ModelError, match=f"{files[1]} is missing"):
        read_card(ModelSettings(name=str(copy), variant="fp16"))


def test_the_stock_unet_is_not_read(copy: Path, decidiffusion_folder: Path, model: Any) -> None:
    """The stock UNet may be invalid, as in the fixture, or missing. The checkpoint's pipeline.py never runs either."""
    assert (copy / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == b"no weights"
    assert "raise" in (copy / "pipeline.py").read_text("utf-8")
    shutil.rmtree(copy / "unet")
    before, after = (read_card(ModelSettings(name=str(folder))) for folder in (decidiffusion_folder, copy))
    assert before.fingerprint == after.fingerprint
    request = make_request(steps=2, rescale=0.7)
    assert np.array_equal(render(load_family(copy), [request])["row"].pixels, render(model, [request])["row"].pixels)


def test_the_fingerprint_changes_with_the_weights(copy: Path, decidiffusion_folder: Path) -> None:
    damage(copy, lambda w: w["conv_out.bias"].add_(1))
    before, after = (read_card(ModelSettings(name=str(folder))) for folder in (decidiffusion_folder, copy))
    assert before.fingerprint != after.fingerprint


# Images


@pytest.mark.promises
def test_batched_rows_match_the_reference(model: Any, reference: ReferencePipeline) -> None:
    """Less than 1% of the values may differ, by 1 of 255. Other rows differ more, so swapped rows would be detected."""
    rendered = render(model, ROWS, slots=6, decode=2)
    references = {row.id: reference.render(row) for row in ROWS}
    assert rendered.keys() == references.keys()
    for name, expected in references.items():
        image = rendered[name].pixels
        assert image.shape == expected.shape
        assert max_difference(image, expected) <= 1
        assert np.mean(image != expected) < 0.01
        others = [image for other, image in references.items() if other != name and image.shape == expected.shape]
        assert all(max_difference(expected, other) > 2 for other in others)


def test_a_row_has_the_same_bytes_alone_and_among_others(model: Any) -> None:
    square = [row for row in ROWS if (row.params.height, row.params.width) == (64, 64)]
    batched = render(model, [make_request(str(k), f"{k} stars", steps=3 + k, seed=k) for k in range(5)] + square[::-1])
    for row in square:
        assert np.array_equal(render(model, [row])[row.id].pixels, batched[row.id].pixels)


@pytest.mark.promises
def test_the_command_renders_a_table(decidiffusion_folder: Path, reference: ReferencePipeline, tmp_path: Path) -> None:
    """The first row uses the model's default parameters. The second run renders nothing."""
    table = write_csv(
        tmp_path / "t.csv",
        [
            ["prompt", "seed", "num_inference_steps", "guidance_scale", "guidance_rescale"],
            ["a red circle", "5", "", "", ""],
            ["a blue square", "6", "3", "1", "0"],
            ["a green star", "7", "5", "4.5", "0"],
        ],
    )
    out = tmp_path / "out"
    options = ("--model", str(decidiffusion_folder), "--on-flagged", "keep", "--slots", "6", "--threads", "1")
    result = command("run", table, "--out", out, "--device", "cpu", *options)
    assert result.code == 0, result.stderr
    assert_whole(out)
    rows = results(out)
    params = [(row["num_inference_steps"], row["guidance_scale"], round(row["guidance_rescale"], 6)) for row in rows]
    assert params == [(30, 7.5, 0.7), (3, 1.0, 0.0), (5, 4.5, 0.0)]
    assert {row["scheduler"] for row in rows} == {"DDIMScheduler"}
    assert all(row["nsfw_content_detected"] in (True, False) for row in rows)
    assert run_json(out)["model"]["family"] == "decidiffusion"
    for row in rows:
        steps, guidance, rescale = row["num_inference_steps"], row["guidance_scale"], row["guidance_rescale"]
        request = make_request("", row["prompt"], steps=steps, guidance=guidance, rescale=rescale, seed=row["seed"])
        assert max_difference(np.asarray(Image.open(out / row["generated_image"])), reference.render(request)) <= 1
    before = hashes(out)
    again = command("run", table, "--out", out, "--device", "cpu", *options, "--json")
    assert (again.code, json.loads(again.stdout)["rendered"], hashes(out)) == (0, 0, before)
