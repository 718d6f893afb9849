"""Single-file checkpoints are converted once and render the images of their folder. Other files are refused by kind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from platformdirs import user_cache_path
from safetensors.torch import load_file, save_file

from batch_infer.errors import ModelError
from batch_infer.models import read_card
from batch_infer.models.conversion import PIPELINES, infer_kind
from batch_infer.models.untrusted import read_shapes
from batch_infer.settings import ModelSettings
from tests.checkpoints import amend
from tests.rendering import load_family, make_request, render
from tests.runs import results, run, run_json
from tests.single_files import fill_cache, save_single_file, zeros

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
WHOLE = ("model.diffusion_model.x", "first_stage_model.x", "cond_stage_model.x")
V2 = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
XL = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CARD = """
import sys
from batch_infer.models import read_card
from batch_infer.settings import ModelSettings
print(read_card(ModelSettings(name=sys.argv[1])).fingerprint, "torch" in sys.modules)
"""


def card_of(file: Path) -> Any:
    return read_card(ModelSettings(name=str(file)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up empty caches of Hugging Face and of batch-infer, and return that of Hugging Face."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    return tmp_path / "hf" / "hub"


@pytest.fixture
def filled(cache: Path, sd1_folder: Path) -> Path:
    """Cache the configs and vocabulary with which diffusers reads a file of Stable Diffusion 1."""
    return fill_cache(cache, BASE, sd1_folder)


@pytest.fixture
def file(sd1_folder: Path, tmp_path: Path) -> Path:
    return save_single_file(sd1_folder, tmp_path / "dreams-v1.5.safetensors")


def test_the_folder_has_the_original_configs_and_the_files_weights(file: Path, filled: Path) -> None:
    """The fingerprint must not depend on the version of a library or on a path."""
    (filled / "unet" / "mine.py").write_text("raise SystemExit")
    (filled / "unet" / "diffusion_pytorch_model.bin").write_text("pickled")
    amend(filled / "unet" / "config.json", _diffusers_version="0.20.0")
    converted = card_of(file).path
    files = {path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()}
    configs = {path.relative_to(filled).as_posix() for path in filled.rglob("*.json")}
    excluded = {"safety_checker/config.json", "feature_extractor/preprocessor_config.json"}
    weights = {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
    assert files == configs - excluded | weights | {"text_encoder/model.safetensors"}
    for name in configs - excluded - {"model_index.json"}:
        assert (converted / name).read_bytes() == (filled / name).read_bytes()


def test_a_file_renders_the_images_of_its_folder(file: Path, filled: Path, sd1_folder: Path) -> None:
    rows = [make_request("guided", "a red circle", seed=3), make_request("free", "two stars", guidance=1.0, seed=4)]
    mine, theirs = (render(load_family(path), rows) for path in (file, sd1_folder))
    for row in rows:
        assert np.array_equal(mine[row.id].pixels, theirs[row.id].pixels)
    card = card_of(file)
    assert (card.name, card.family, card.revision) == ("dreams-v1.5", "stable_diffusion", None)
    assert card.sizes == card_of(sd1_folder).sizes
    assert not card.has_checker
    assert card.path.is_relative_to(user_cache_path("batch-infer"))


def test_the_second_use_needs_neither_torch_nor_the_configs(file: Path, filled: Path, cache: Path) -> None:
    first = card_of(file)
    shutil.rmtree(cache)
    moved = shutil.copy(file, file.with_name("renamed.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", CARD, moved], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.split() == [first.fingerprint, "False"]


def test_the_fingerprint_changes_with_a_weight_but_not_with_the_path(
    file: Path, filled: Path, sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = card_of(file).fingerprint
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "another" / "hub"))
    fill_cache(tmp_path / "another" / "hub", BASE, sd1_folder)
    assert card_of(file).fingerprint == first
    tensors = load_file(file)
    tensors[FIRST] += 1e-3
    save_file(tensors, file)
    assert card_of(file).fingerprint != first


def test_weights_keep_their_precision(file: Path, filled: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    weights = load_file(card_of(file).path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_a_run_names_the_file_and_the_folder(file: Path, filled: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt\na red circle\n")
    assert run(tmp_path / "t.csv", tmp_path / "out", "--model", file).code == 0
    model = run_json(tmp_path / "out")["model"]
    assert model["name"] == "dreams-v1.5"
    assert (Path(model["path"]) / "model_index.json").is_file()
    assert [row["status"] for row in results(tmp_path / "out")] == ["ok"]


def test_an_interrupted_conversion_is_repeated(file: Path, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            card_of(file)
    converted = user_cache_path("batch-infer") / "converted-1"
    assert not [path for path in converted.iterdir() if path.is_dir()]
    half = converted / f".tmp-{card_of(file).path.name}"  # a power cut leaves such a folder
    shutil.copytree(card_of(file).path, half)
    shutil.rmtree(card_of(file).path)
    (half / "stray").mkdir()
    assert not (card_of(file).path / "stray").exists()
    assert not half.exists()


def test_missing_configs_are_reported(file: Path, cache: Path) -> None:
    with pytest.raises(
        ModelError, match=f"configs and vocabularies of {BASE}.*folder as --model needs no network"
    ) as exc_info:
        card_of(file)
    assert str(file) in str(exc_info.value)
    assert "\n" not in str(exc_info.value)
    assert not [path for path in (user_cache_path("batch-infer") / "converted-1").iterdir() if path.is_dir()]


def test_incomplete_configs_are_refused(file: Path, filled: Path) -> None:
    (filled / "unet" / "config.json").unlink()
    with pytest.raises(ModelError, match="could not be read by diffusers|unet/config.json") as exc_info:
        card_of(file)
    assert str(file) in str(exc_info.value)


def test_a_text_encoder_under_other_names_is_refused(file: Path, filled: Path) -> None:
    """Some merge tools write such names, and diffusers does not find them."""
    tensors = {
        name.replace("text_model.", "") if name.startswith("cond_stage_model") else name: tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    with pytest.raises(ModelError, match="could not be read by diffusers: .*CLIPTextModel"):
        card_of(file)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.bias",
        "first_stage_model.quant_conv.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)
def test_a_missing_tensor_is_named(file: Path, filled: Path, name: str) -> None:
    rewrite(lambda tensors: tensors.pop(name))(file)
    with pytest.raises(ModelError, match=r"lacks tensors of .*; is the file complete\?"):
        card_of(file)


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (zeros(*WHOLE), "v1"),
        ({**zeros(*WHOLE), **zeros(V2, shape=(8, 1024))}, "v2"),
        ({**zeros(*WHOLE), **zeros(XL)}, "xl_base"),
        ({**zeros(*WHOLE), **zeros(FIRST, shape=(8, 9, 3, 3))}, "inpainting"),
        ({**zeros(*WHOLE), **zeros(XL), **zeros(FIRST, shape=(8, 9, 3, 3))}, "xl_inpaint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_kind_is_inferred_from_names_and_shapes(tmp_path: Path, cache: Path, tensors: Any, kind: str) -> None:
    path = tmp_path / "some.safetensors"
    save_file(tensors, path)
    assert infer_kind(read_shapes(path, str(path))) == kind
    expected = {
        "v1": "StableDiffusionPipeline",
        "v2": "StableDiffusionPipeline",
        "xl_base": "StableDiffusionXLPipeline",
    }
    if kind in expected:
        assert PIPELINES[kind].__name__ == expected[kind]
        return
    with pytest.raises(ModelError, match=f"is a {kind} checkpoint; only files of Stable Diffusion 1.x, 2.x and XL"):
        card_of(path)


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite_file(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return rewrite_file


def keep(start: str) -> Callable[[Path], object]:
    return rewrite(lambda tensors: [tensors.pop(name) for name in list(tensors) if not name.startswith(start)])


def write(*names: str) -> Callable[[Path], object]:
    return lambda file: save_file(zeros(*names), file)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a LoRA from kohya": (write("lora_unet_mid_block_proj_in.lora_down.weight"), "is a LoRA: name it in --lora"),
    "a LoRA from diffusers": (write("unet.mid_block.proj_in.lora_A.weight"), "is a LoRA: name it in --lora"),
    "a ControlNet": (write("control_model.time_embed.0.weight"), "is a ControlNet"),
    "a ControlNet from diffusers": (write("controlnet_cond_embedding.conv_in.weight"), "is a ControlNet"),
    "an embedding": (write("emb_params"), "UNet and VAE and text encoder: use a complete checkpoint"),
    "a UNet": (keep("model.diffusion_model."), "no tensors of a checkpoint's VAE and text encoder"),
    "no text encoder": (rewrite(lambda t: [t.pop(n) for n in list(t) if "cond_" in n]), "checkpoint.s text encoder"),
    "half a file": (lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]), "incomplete; download it again"),
    "a page of text": (lambda f: f.write_text("not found, sorry"), "is damaged or incomplete"),
    "a pointer": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_by_kind(file: Path, case: str) -> None:
    damage, reason = REFUSED[case]
    damage(file)
    with pytest.raises(ModelError, match=reason) as exc_info:
        card_of(file)
    assert str(file) in str(exc_info.value)
    assert "\n" not in str(exc_info.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.ckpt", "is pickled, and reading a pickle can run code"),
        ("a.bin", "is pickled"),
        ("a.gguf", "is not a .safetensors file; use one"),
    ],
)
def test_other_file_formats_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=reason):
        card_of(tmp_path / name)


def test_a_marked_checkpoint_uses_velocity_prediction(file: Path, filled: Path) -> None:
    rewrite(lambda tensors: tensors.update(zeros("v_pred", "ztsnr")))(file)
    scheduler = json.loads((card_of(file).path / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_an_unmarked_checkpoint_logs_a_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    from batch_infer.models import conversion

    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with caplog.at_level(logging.WARNING, "batch_infer"):
        conversion._set_scheduler(Path("x.safetensors"), "v2", {}, tmp_path)
    assert "--scheduler DDIMScheduler:prediction_type=epsilon --height 512 --width 512" in caplog.text
