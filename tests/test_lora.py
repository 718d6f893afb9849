"""LoRAs are fused as in diffusers, change the fingerprint, and are refused if they do not fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from batch_infer.errors import ModelError
from batch_infer.models import ModelCard, checkpoint, load_latent_diffusion, read_card
from batch_infer.settings import LoraSpec, ModelSettings
from tests.checkpoints import amend
from tests.oracle import assert_close, call_diffusers, load_pipeline
from tests.rendering import CPU, copy_folder, make_request, max_difference, render
from tests.runs import CommandResult, command, results, run, run_json

ROWS = (
    make_request("guided", "a red circle", steps=6, seed=1),
    make_request("negative", "two blue squares", steps=5, negative="green", seed=2),
    make_request("unguided", "a small star", steps=4, guidance=1.0, seed=3),
)
LAYERS = {
    "unet": ("to_q", "to_v", "to_out.0", "ff.net.2"),
    "text_encoder": ("q_proj", "out_proj"),
    "text_encoder_2": ("q_proj", "v_proj"),
}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}

Tensors = dict[str, torch.Tensor]


def make_lora(pipe: Any, *networks: str, seed: int = 0) -> Tensors:
    """Make a random LoRA of rank 4 for some linear layers of these networks, with diffusers' names."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for network in networks:
        for name, module in getattr(pipe, network).named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(LAYERS[network]):
                down, up = (4, module.in_features), (module.out_features, 4)
                tensors[f"{network}.{name}.lora_A.weight"] = torch.randn(down, generator=random) * 0.2
                tensors[f"{network}.{name}.lora_B.weight"] = torch.randn(up, generator=random) * 0.2
    return tensors


def as_kohya(tensors: Tensors) -> Tensors:
    """Rename tensors as kohya's trainer does, with an alpha that halves the strength."""
    renamed = {}
    for name, tensor in tensors.items():
        network, _, rest = name.partition(".")
        layer, _, part = rest.partition(".lora_")
        start = KOHYA[network] + layer.replace(".", "_")
        renamed[f"{start}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = tensor
        renamed[f"{start}.alpha"] = torch.tensor(2.0)
    return renamed


@pytest.fixture(scope="module")
def pipe(sd1_folder: Path) -> StableDiffusionPipeline:
    return load_pipeline(sd1_folder)


@pytest.fixture(scope="module")
def files(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    both = make_lora(pipe, "unet", "text_encoder")
    tensors = {
        "both": both,
        "unet": make_lora(pipe, "unet", seed=1),
        "text": make_lora(pipe, "text_encoder", seed=2),
        "kohya": as_kohya(both),
    }
    for name, content in tensors.items():
        save_file(content, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in tensors}


def card_of(folder: Path, *specs: LoraSpec) -> ModelCard:
    return read_card(ModelSettings(name=str(folder), loras=specs))


def load_model(folder: Path, *specs: LoraSpec) -> Any:
    return load_latent_diffusion(card_of(folder, *specs), CPU, torch.float32, with_checker=False)


def load_reference(folder: Path, *specs: LoraSpec) -> StableDiffusionPipeline:
    """Return diffusers' pipeline with all LoRAs loaded together and fused at once."""
    pipe = load_pipeline(folder)
    names = [f"adapter{number}" for number in range(len(specs))]
    for name, spec in zip(names, specs, strict=True):
        pipe.load_lora_weights(spec.file, adapter_name=name)
    pipe.set_adapters(names, [spec.weight for spec in specs])
    pipe.fuse_lora(adapter_names=names)
    pipe.unload_lora_weights()
    return pipe


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize(
    "weights",
    [
        {"both": 1.0},
        {"unet": 0.5},
        {"text": 0.8},
        {"kohya": 1.0},
        {"both": 0.7, "unet": -0.5},
        {"unet": 1.0, "text": 0.3},
    ],
    ids=str,
)
def test_images_equal_those_of_diffusers(sd1_folder: Path, files: dict[str, Path], weights: dict[str, float]) -> None:
    specs = [LoraSpec(str(files[name]), weight) for name, weight in weights.items()]
    theirs, plain = load_reference(sd1_folder, *specs), load_pipeline(sd1_folder)
    rendered = render(load_model(sd1_folder, *specs), ROWS)
    for row in ROWS:
        assert_close(rendered[row.id].pixels, call_diffusers(theirs, row)[0])
        assert max_difference(rendered[row.id].pixels, call_diffusers(plain, row)[0]) > 2


@pytest.mark.promises
def test_xl_fuses_both_text_encoders(sdxl_folder: Path, tmp_path: Path) -> None:
    tensors = make_lora(load_pipeline(sdxl_folder), "unet", "text_encoder", "text_encoder_2")
    save_file(tensors, tmp_path / "xl.safetensors")
    for network in LAYERS:
        part = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{network}.")}
        save_file(part, tmp_path / f"{network}.safetensors")
    spec = LoraSpec(str(tmp_path / "xl.safetensors"), 0.7)
    theirs, rendered = load_reference(sdxl_folder, spec), render(load_model(sdxl_folder, spec), ROWS)
    for row in ROWS:
        assert_close(rendered[row.id].pixels, call_diffusers(theirs, row)[0])
    parts = [LoraSpec(str(tmp_path / f"{network}.safetensors"), 0.7) for network in LAYERS]
    apart = render(load_model(sdxl_folder, *parts), ROWS)
    for row in ROWS:
        assert_close(apart[row.id].pixels, rendered[row.id].pixels)
    fewer = render(load_model(sdxl_folder, *parts[:2]), ROWS)
    assert all(max_difference(fewer[row.id].pixels, rendered[row.id].pixels) > 2 for row in ROWS)


def test_fused_networks_have_their_original_layers(sd1_folder: Path, files: dict[str, Path]) -> None:
    """No layer of peft remains, so denoising and compilation see the original layers."""
    model = load_model(sd1_folder, LoraSpec(str(files["both"])))
    for network in (model.pipeline.unet, model.pipeline.text_encoder):
        assert not [name for name, _ in network.named_parameters() if "lora" in name]
        assert {type(module).__module__.partition(".")[0] for module in network.modules()} <= {
            *("torch", "diffusers", "transformers")
        }


def test_weight_zero_changes_nothing(sd1_folder: Path, files: dict[str, Path], pipe: StableDiffusionPipeline) -> None:
    weights = load_model(sd1_folder, LoraSpec(str(files["both"]), 0.0)).pipeline.unet.state_dict()
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(weights[name], weight)


def test_the_fingerprint_depends_on_file_weight_and_order(
    sd1_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    one, other = str(files["both"]), str(files["unet"])
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(files["both"].read_bytes())
    fingerprints = [
        card_of(sd1_folder, *specs).fingerprint
        for specs in (
            (),
            (LoraSpec(one),),
            (LoraSpec(one, 0.9),),
            (LoraSpec(other),),
            (LoraSpec(one), LoraSpec(other)),
            (LoraSpec(other), LoraSpec(one)),
        )
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert card_of(sd1_folder, LoraSpec(str(moved))).fingerprint == fingerprints[1]
    card = card_of(sd1_folder, LoraSpec(one, 0.5))
    assert (card.name, card.title) == ("sd1", "sd1 + both:0.5")


def test_a_run_records_its_loras(sd1_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("prompt\na red circle\n")

    def run_with(*options: str | Path) -> CommandResult:
        return run(table, out, "--model", sd1_folder, *options)

    assert run_with("--lora", f"{files['both']}:0.5").code == 0
    (lora,) = run_json(out)["model"]["loras"]
    assert (lora["path"], lora["weight"]) == (str(files["both"]), 0.5)
    (row,) = results(out)
    with Image.open(out / row["generated_image"]) as image:
        assert f"Model hash: {run_json(out)['model']['fingerprint']}, " in image.info["parameters"]
    other = run_with("--lora", f"{files['both']}:0.6")
    assert other.code == 2
    assert "was made with model sd1" in other.stderr


def test_retry_finds_model_and_lora_from_any_folder(
    sd1_folder: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("prompt\na red circle\n")
    Path("style.safetensors").write_bytes(files["both"].read_bytes())
    assert run("t.csv", tmp_path / "out", "--model", sd1_folder, "--lora", "style.safetensors").code == 0
    (row,) = results(tmp_path / "out")
    (tmp_path / "out" / row["generated_image"]).unlink()
    monkeypatch.chdir("/")
    assert command("retry", tmp_path / "out", "--status", "missing", "--no-progress").code == 0
    (again,) = results(tmp_path / "out")
    assert (again["sha256"], again["attempt"]) == (row["sha256"], 2)


# Refused LoRAs


def test_a_missing_peft_is_named(sd1_folder: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(ModelError, match=r"--lora needs peft: pip install peft"):
        card_of(sd1_folder, LoraSpec(str(files["both"])))


def test_a_lora_for_a_family_without_support_is_refused(
    sd1_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    copy = copy_folder(sd1_folder, tmp_path)
    (copy / "unet").rename(copy / "flexible_unet")
    amend(copy / "model_index.json", _class_name="DeciDiffusionPipeline")
    with pytest.raises(
        ModelError, match="a DeciDiffusionPipeline, for which diffusers has no LoRA loader: leave --lora"
    ):
        card_of(copy, LoraSpec(str(files["both"])))


def first_name(tensors: Tensors) -> str:
    return next(name for name in tensors if name.startswith("unet.") and "lora_A" in name)


def rename_one(tensors: Tensors) -> None:
    name = first_name(tensors)
    for part in ("lora_A", "lora_B"):
        tensors[f"unet.down_blocks.7.attentions.0.to_q.{part}.weight"] = tensors.pop(name.replace("lora_A", part))


def widen(tensors: Tensors) -> None:
    name = first_name(tensors)
    tensors[name] = torch.zeros(4, 320)


def target_another_part(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace("unet.", "transformer.")] = tensors.pop(name)


def remove_a_half(tensors: Tensors) -> None:
    tensors.pop(first_name(tensors).replace("lora_A", "lora_B"))


def make_xl(tensors: Tensors) -> None:
    """Make a LoRA for Stable Diffusion XL with kohya's names."""
    tensors.clear()
    for block, width in ((4, 640), (7, 1280)):
        start = f"lora_unet_input_blocks_{block}_1_transformer_blocks_0_attn1_to_q"
        tensors |= {
            f"{start}.lora_down.weight": torch.zeros(4, width),
            f"{start}.lora_up.weight": torch.zeros(width, 4),
        }
        tensors[f"{start}.alpha"] = torch.tensor(4.0)
    tensors["lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"] = torch.zeros(4, 768)
    tensors["lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"] = torch.zeros(768, 4)


def add_nan(tensors: Tensors) -> None:
    tensors[first_name(tensors)][0, 0] = torch.nan


UNFIT: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a missing layer": (rename_one, "does not fit sd1"),
    "another width": (widen, "does not fit sd1"),
    "another kind of model": (target_another_part, "does not fit sd1.*family"),
    "half of a layer": (remove_a_half, "does not fit sd1"),
    "a LoRA for Stable Diffusion XL": (make_xl, "does not fit sd1.*was it made for another family"),
    "weights that are not finite": (add_nan, "cannot be added to sd1: NaN"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_lora_of_another_model_is_refused(
    sd1_folder: Path, files: dict[str, Path], tmp_path: Path, case: str
) -> None:
    damage, reason = UNFIT[case]
    tensors = load_file(files["both"])
    damage(tensors)
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError, match=reason) as exc_info:
        load_model(sd1_folder, LoraSpec(str(path)))
    assert str(path) in str(exc_info.value)
    assert "\n" not in str(exc_info.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"conv_in.weight": torch.zeros(1)}, "is not a LoRA"),
        ({"unet.a.lora_A.weight": torch.zeros(1), "unet.a.lora_mid.weight": torch.zeros(1)}, "not .* Tucker"),
        ({"lora_unet_a.hada_w1_a": torch.zeros(1)}, "contains lora_unet_a.hada_w1_a: only LoRA and DoRA"),
        ({"lora_unet_a.diff": torch.zeros(1)}, "contains lora_unet_a.diff: .* not .* full differences"),
        (None, "there is no such file"),
    ],
    ids=["a checkpoint", "Tucker", "LoHa", "difference", "nothing"],
)
def test_files_other_than_loras_are_refused(sd1_folder: Path, tmp_path: Path, tensors: Any, reason: str) -> None:
    path = tmp_path / "odd.safetensors"
    if tensors:
        save_file(tensors, path)
    with pytest.raises(ModelError, match=reason) as exc_info:
        card_of(sd1_folder, LoraSpec(str(path)))
    assert str(path) in str(exc_info.value)


def test_a_truncated_file_is_refused(sd1_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    path.write_bytes(files["both"].read_bytes()[:5000])
    with pytest.raises(ModelError, match="half.safetensors is damaged or incomplete; download it again"):
        card_of(sd1_folder, LoraSpec(str(path)))
