"""LoRA and DoRA files of many formats change the weights as their formulas say, and no tensor is ignored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from batch_infer.errors import ModelError
from batch_infer.models import AnyPipeline, load_latent_diffusion, read_card
from batch_infer.settings import LoraSpec, ModelSettings
from tests.loras import KOHYA, KOHYA_XL, Layer, Tensors, as_diffusers, as_kohya, as_peft, make_layers
from tests.oracle import load_pipeline
from tests.pipelines import SAVE_FUNCTIONS, save_sd3
from tests.rendering import CPU


def load(folder: Path, tensors: Tensors, path: Path, weight: float = 1.0, **metadata: str) -> Any:
    """Return the pipeline of a checkpoint with a LoRA."""
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    card = read_card(ModelSettings(name=str(folder), loras=(LoraSpec(str(path), weight),)))
    if card.uses_pipeline_call:
        return AnyPipeline.load(card, CPU, torch.float32, with_checker=False).pipeline
    return load_latent_diffusion(card, CPU, torch.float32, with_checker=False).pipeline


def assert_weights(
    plain: Any,
    changed: Any,
    layers: dict[tuple[str, str], Layer],
    formula: Callable[[Layer, torch.Tensor], torch.Tensor],
) -> None:
    """Assert that the weights of the layers follow a formula, and that all other weights are unchanged."""
    networks = {name: part for name, part in plain.components.items() if isinstance(part, torch.nn.Module)}
    changes = 0
    for name, network in networks.items():
        actual = getattr(changed, name).state_dict()
        assert actual.keys() == network.state_dict().keys()
        for key, weight in network.state_dict().items():
            layer = layers.get((name, key.removesuffix(".weight")))
            if layer is None:
                assert torch.equal(actual[key], weight), key
            else:
                changes += 1
                torch.testing.assert_close(actual[key], formula(layer, weight), atol=2e-6, rtol=1e-5)
                assert (actual[key] - weight).abs().max() > 1e-3
    assert changes == len(layers)


FORMATS: dict[str, tuple[Callable[..., Tensors], Callable[[Layer, torch.Tensor], torch.Tensor]]] = {
    "peft": (as_peft, lambda layer, weight: layer.add(weight, 0.7)),
    "diffusers": (as_diffusers, lambda layer, weight: layer.add(weight, 0.7)),
    "kohya": (lambda layers: as_kohya(layers, KOHYA), lambda layer, weight: layer.add(weight, 0.7, layer.alpha)),
    "kohya without alphas": (
        lambda layers: as_kohya(layers, KOHYA, alpha=False), lambda layer, weight: layer.add(weight, 0.7)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_weights_follow_the_formula(sd1_folder: Path, tmp_path: Path, name: str) -> None:
    make_tensors, formula = FORMATS[name]
    plain = load_pipeline(sd1_folder)
    layers = make_layers(plain, "unet", "text_encoder")
    changed = load(sd1_folder, make_tensors(layers), tmp_path / "style.safetensors", 0.7)
    assert_weights(plain, changed, layers, formula)


def test_half_of_the_layers_may_have_an_alpha(sd1_folder: Path, tmp_path: Path) -> None:
    plain = load_pipeline(sd1_folder)
    layers = make_layers(plain, "unet", "text_encoder")
    tensors = as_kohya(layers, KOHYA)
    without = [name for name in tensors if name.endswith("alpha")][::2]
    for name in without:
        del tensors[name]
    starts = {name.removesuffix(".alpha") for name in without}

    def formula(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
        ((network, name),) = [key for key, value in layers.items() if value is layer]
        start = KOHYA[network] + name.removeprefix("text_model.").replace(".", "_")
        return layer.add(weight, alpha=None if start in starts else layer.alpha)

    assert_weights(plain, load(sd1_folder, tensors, tmp_path / "style.safetensors"), layers, formula)


@pytest.mark.parametrize("convolutions", [False, True], ids=["linear", "convolutions"])
@pytest.mark.parametrize("name", ["peft", "kohya"])
def test_dora_follows_its_formula(sd1_folder: Path, tmp_path: Path, name: str, convolutions: bool) -> None:
    plain = load_pipeline(sd1_folder)
    layers = make_layers(plain, "unet", "text_encoder", convolutions=convolutions)
    if name == "peft":
        tensors, uses_alpha = as_peft(layers, dora=True), False
    else:
        tensors, uses_alpha = as_kohya(layers, KOHYA, dora=True), True
    changed = load(sd1_folder, tensors, tmp_path / "style.safetensors")
    assert_weights(
        plain, changed, layers, lambda layer, weight: layer.decompose(weight, layer.alpha if uses_alpha else None)
    )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_xl_with_three_networks(sdxl_folder: Path, tmp_path: Path, dora: bool) -> None:
    plain = load_pipeline(sdxl_folder)
    layers = make_layers(plain, "unet", "text_encoder", "text_encoder_2")
    changed = load(sdxl_folder, as_kohya(layers, KOHYA_XL, dora=dora), tmp_path / "style.safetensors")
    assert_weights(
        plain,
        changed,
        layers,
        lambda layer, weight: (layer.decompose if dora else layer.add)(weight, alpha=layer.alpha),
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_in_metadata(sd1_folder: Path, tmp_path: Path, rslora: bool) -> None:
    plain = load_pipeline(sd1_folder)
    layers = make_layers(plain, "unet", "text_encoder")
    configs: dict[str, Any] = {}
    for network in ("unet", "text_encoder"):
        pattern = {name: layer.alpha for (other, name), layer in layers.items() if other == network}
        configs |= {f"{network}.r": 4, f"{network}.lora_alpha": 9, f"{network}.alpha_pattern": pattern}
        configs[f"{network}.use_rslora"] = rslora
    changed = load(sd1_folder, as_peft(layers), tmp_path / "a.safetensors", lora_adapter_metadata=json.dumps(configs))

    def formula(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
        return layer.add(weight, alpha=layer.alpha * (math.sqrt(layer.rank) if rslora else 1))

    assert_weights(plain, changed, layers, formula)


def test_stable_diffusion_3(tmp_path: Path) -> None:
    folder = save_sd3(tmp_path / "sd3")
    plain = load_pipeline(folder)
    layers = make_layers(plain, "transformer", "text_encoder", "text_encoder_2")
    changed = load(folder, as_peft(layers), tmp_path / "style.safetensors", 0.5)
    assert_weights(plain, changed, layers, lambda layer, weight: layer.add(weight, 0.5))


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_pipelines_without_a_family(tmp_path: Path, name: str) -> None:
    folder = SAVE_FUNCTIONS[name](tmp_path / name)
    plain = load_pipeline(folder)
    networks = ("transformer", "text_encoder") if name == "flux" else ("transformer",)
    layers = make_layers(plain, *networks) | make_single(plain)
    changed = load(folder, as_peft(layers), tmp_path / "style.safetensors", 0.5)
    assert_weights(plain, changed, layers, lambda layer, weight: layer.add(weight, 0.5))


def make_single(plain: Any) -> dict[tuple[str, str], Layer]:
    names = [name for name, _ in plain.transformer.named_modules() if name.endswith("attention.to_k")]
    random = torch.Generator().manual_seed(7)
    return {
        ("transformer", name): Layer(
            torch.randn(4, 32, generator=random), torch.randn(32, 4, generator=random), 4.0, torch.ones(32)
        )
        for name in names
    }


def test_a_fused_layer_of_flux_is_split(tmp_path: Path) -> None:
    folder = SAVE_FUNCTIONS["flux"](tmp_path / "flux")
    plain = load_pipeline(folder)
    random = torch.Generator().manual_seed(0)
    fused = Layer(torch.randn(4, 32, generator=random), torch.randn(96, 4, generator=random), 3.0, torch.ones(96))
    proj = Layer(torch.randn(4, 32, generator=random), torch.randn(32, 4, generator=random), 1.0, torch.ones(32))
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in {"img_attn_qkv": fused, "txt_attn_proj": proj}.items():
        start = f"lora_unet_double_blocks_0_{name}"
        tensors |= {f"{start}.lora_down.weight": layer.down, f"{start}.lora_up.weight": layer.up}
        tensors[f"{start}.alpha"] = torch.tensor(layer.alpha)
    attention = "transformer_blocks.0.attn"
    layers = {("transformer", f"{attention}.to_add_out"): proj}
    for number, part in enumerate("qkv"):
        up = fused.up[32 * number : 32 * number + 32]
        layers["transformer", f"{attention}.to_{part}"] = Layer(fused.down, up, fused.alpha, torch.ones(32))
    changed = load(folder, tensors, tmp_path / "style.safetensors")
    assert_weights(plain, changed, layers, lambda layer, weight: layer.add(weight, alpha=layer.alpha))


def test_a_pipeline_without_a_loader_is_refused(tmp_path: Path) -> None:
    folder = SAVE_FUNCTIONS["pixart"](tmp_path / "pixart")
    with pytest.raises(ModelError, match="is a PixArtSigmaPipeline, for which diffusers has no LoRA loader: leave"):
        load(folder, {"transformer.a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "style.safetensors")


def add_unknown(tensors: Tensors) -> None:
    tensors["unet.conv_in.other_lora.weight"] = torch.ones(2)


def add_lonely_alpha(tensors: Tensors) -> None:
    tensors["unet.conv_in.alpha"] = torch.tensor(1.0)


def turn_magnitudes(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("magnitude_vector"):
            tensors[name] = tensors[name].reshape(1, -1)


def drop_a_magnitude(tensors: Tensors) -> None:
    del tensors[next(name for name in tensors if name.endswith("magnitude_vector"))]


DAMAGES = {
    "unknown tensor": (add_unknown, "does not fit sd1.*other_lora"),
    "lonely alpha": (add_lonely_alpha, "unet.conv_in has an alpha or a magnitude, but no LoRA"),
    "magnitudes of inputs": (turn_magnitudes, r"is not a magnitude for each output: its shape is \[1, "),
    "a layer without a magnitude": (drop_a_magnitude, "does not fit sd1"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_no_tensor_is_ignored(sd1_folder: Path, tmp_path: Path, case: str) -> None:
    damage, reason = DAMAGES[case]
    tensors = as_peft(make_layers(load_pipeline(sd1_folder), "unet"), dora=True)
    damage(tensors)
    with pytest.raises(ModelError, match=reason):
        load(sd1_folder, tensors, tmp_path / "odd.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_half_precision(sd1_folder: Path, tmp_path: Path, dtype: torch.dtype, dora: bool) -> None:
    plain = load_pipeline(sd1_folder)
    layers = make_layers(plain, "unet", "text_encoder")
    path = tmp_path / "style.safetensors"
    save_file({name: tensor.clone() for name, tensor in as_kohya(layers, KOHYA, dora=dora).items()}, path)
    card = read_card(ModelSettings(name=str(sd1_folder), loras=(LoraSpec(str(path), 0.5),)))
    changed = load_latent_diffusion(card, CPU, dtype, with_checker=False).pipeline
    for (network, name), layer in layers.items():
        weight = getattr(plain, network).get_submodule(name).weight
        actual = getattr(changed, network).get_submodule(name).weight
        alpha = layer.alpha * 0.5
        expected = (layer.decompose if dora else layer.add)(weight, alpha=alpha)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected, atol=0.03, rtol=0.02)


@pytest.mark.promises
def test_half_precision_of_pipelines_without_a_family(tmp_path: Path) -> None:
    folder = SAVE_FUNCTIONS["flux"](tmp_path / "flux")
    layers = make_layers(load_pipeline(folder), "transformer", "text_encoder")
    save_file(as_peft(layers), tmp_path / "style.safetensors")
    card = read_card(ModelSettings(name=str(folder), loras=(LoraSpec(str(tmp_path / "style.safetensors")),)))
    changed = AnyPipeline.load(card, CPU, torch.bfloat16, with_checker=False).pipeline
    for (network, name), layer in layers.items():
        expected = layer.add(getattr(load_pipeline(folder), network).get_submodule(name).weight)
        actual = getattr(changed, network).get_submodule(name).weight
        torch.testing.assert_close(actual.float(), expected, atol=0.03, rtol=0.02)
