"""Quantized models: their images, their fingerprints, and what is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batch_infer.autotune import explain_out_of_memory
from batch_infer.chain import RenderedImage
from batch_infer.errors import ModelError, SettingsError
from batch_infer.images import compute_psnr
from batch_infer.jobs.run_json import parse_record
from batch_infer.models import ModelCard, checkpoint, denoise_flops, optimize_networks, read_card
from batch_infer.models.quantization import NF4_BLOCK, count_weight_bytes, is_quantized, quantize
from batch_infer.models.untrusted import hash_files
from batch_infer.records import SizeRules
from batch_infer.settings import Compute, ComputeSettings, ModelSettings, Quantization
from batch_infer.worker import load_model, make_chain
from tests.checkpoints import amend
from tests.pipelines import save_flux
from tests.pipelines.saved import make_t5
from tests.rendering import copy_folder, make_request
from tests.runs import command, results, run, run_json
from tests.tables import write_csv

KINDS: tuple[Quantization, ...] = ("int8", "fp8", "nf4")
MIN_PSNR = {"int8": 40.0, "fp8": 25.0, "nf4": 20.0}
"""Lower bounds in dB for these checkpoints, whose random weights amplify errors more than trained ones."""
COMPUTE = Compute("cpu", "float32", 4, 2, 1)
PROMPTS = ("a red circle", "two blue squares", "a small star")

Images = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path) -> dict[str, Path]:
    return {"family": sd1_folder, "pipeline": save_flux(tmp_path_factory.mktemp("pipelines") / "flux")}


def card_of(folder: Path, kind: Quantization | None = None) -> ModelCard:
    card = read_card(ModelSettings(name=str(folder), quantize=kind))
    return replace(card, sizes=SizeRules(64, 64, card.sizes.side_multiple, card.sizes.min_side))


def load(folder: Path, kind: Quantization | None = None) -> Any:
    return load_model(card_of(folder, kind), COMPUTE, with_checker=False)


def render(model: Any, *seeds: int) -> Images:
    rows = [make_request(str(seed), PROMPTS[seed], steps=3, guidance=3.5, seed=seed) for seed in seeds]
    if model.denoiser.config.get("guidance_embeds"):
        rows = [replace(row, params=replace(row.params, embedded_guidance=True)) for row in rows]
    images = {}
    for outcome in make_chain(model, COMPUTE).render(rows):
        assert isinstance(outcome, RenderedImage), outcome.error
        images[outcome.request.id] = outcome.pixels
    return images


@pytest.mark.parametrize("name", ["family", "pipeline"])
def test_images_are_close_to_those_of_the_unquantized_model(folders: dict[str, Path], name: str) -> None:
    plain = load(folders[name])
    expected = render(plain, 0, 1, 2)
    for kind in KINDS:
        model = load(folders[name], kind)
        images = render(model, 0, 1, 2)
        psnr = [compute_psnr(images[seed], expected[seed]) for seed in expected]
        assert MIN_PSNR[kind] < min(psnr) < np.inf
        assert count_weight_bytes(model.pipeline.components.values()) < count_weight_bytes(
            plain.pipeline.components.values()
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["family", "pipeline"])
def test_an_image_does_not_depend_on_its_neighbours(folders: dict[str, Path], name: str, kind: Quantization) -> None:
    """The bytes are also equal after the model is quantized again."""
    together, alone = render(load(folders[name], kind), 0, 1, 2), render(load(folders[name], kind), 1)
    assert np.array_equal(together["1"], alone["1"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_vae_and_the_checker_keep_their_weights(sd1_folder: Path, kind: Quantization) -> None:
    pipeline = load_model(card_of(sd1_folder, kind), COMPUTE, with_checker=True).pipeline
    quantized = {name: is_quantized(part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    assert quantized == {"unet": True, "text_encoder": True, "vae": False, "safety_checker": False}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_their_library_keeps_precise_are_not_quantized(kind: Quantization) -> None:
    """T5's `wo` overflows in half precision, and T5 casts the inputs to the type of its weight."""
    encoder: Any = make_t5()
    encoder.wide = nn.Linear(NF4_BLOCK, 8)
    before = encoder.encoder.block[0].layer[-1].DenseReluDense.wo.weight
    quantize({"text_encoder": encoder}, kind, "the model")
    assert encoder.encoder.block[0].layer[-1].DenseReluDense.wo.weight is before
    assert is_quantized(encoder.wide)


def test_a_model_without_suitable_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="^tiny has no layer that --quantize nf4 can quantize$"):
        quantize({"unet": nn.Sequential(nn.Linear(NF4_BLOCK - 1, 8), nn.Conv2d(4, 4, 1))}, "nf4", "tiny")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_unet_is_optimized_for_a_gpu_and_its_flop_are_counted(sd1_folder: Path, kind: Quantization) -> None:
    """Projections are not fused, because quantized weights cannot be joined."""
    plain, model = load(sd1_folder), load(sd1_folder, kind)
    assert denoise_flops(model, (4, 8, 8)) == denoise_flops(plain, (4, 8, 8))
    optimize_networks(model.networks, torch.device("cuda"), compiled=False)
    assert len(render(model, 0)) == 1


def test_only_quantization_changes_the_fingerprint(sd1_folder: Path) -> None:
    plain, *others = (card_of(sd1_folder, kind) for kind in (None, *KINDS))
    assert plain.fingerprint == hash_files(sd1_folder, {"unet", "vae", "text_encoder", "tokenizer"}, None)
    assert len({card.fingerprint for card in (plain, *others)}) == 4
    assert [card.title for card in (plain, *others)] == ["sd1", "sd1 in int8", "sd1 in fp8", "sd1 in nf4"]


def test_a_run_cannot_continue_with_another_quantization(sd1_folder: Path, tmp_path: Path, out: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])
    assert run(table, out, "--model", sd1_folder, "--quantize", "int8").code == 0
    record = run_json(out)
    assert (record["settings"]["model"]["quantize"], record["model"]["quantize"]) == ("int8", "int8")
    first = results(out)
    assert run(table, out, "--model", sd1_folder, "--quantize", "int8").code == 0
    assert results(out) == first
    for option, other in (((), "sd1"), (("--quantize", "nf4"), "sd1 in nf4")):
        refused = run(table, out, "--model", sd1_folder, *option)
        assert refused.code == 2
        assert "was made with model sd1 in int8 (" in refused.stderr
        assert f"this run has model {other} (" in refused.stderr
    done = command("retry", out, "--status", "missing")
    assert done.code == 0, done.stderr


def test_earlier_records_have_no_quantization() -> None:
    record = parse_record({"settings": {"table": {"tables": ["t.csv"]}, "out": "out", "model": {"name": "m"}}})
    assert record.settings
    assert record.settings.model.quantize is None
    assert record.settings.compute.offload is None


@pytest.mark.parametrize(("kind", "library"), [("fp8", "torchao"), ("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_library_is_reported_with_the_pip_command(
    sd1_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Quantization, library: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None if name == library else find(name))
    sentence = rf"^--quantize {kind} needs {library}: pip install {library}$"
    with pytest.raises(ModelError, match=sentence):
        card_of(sd1_folder, kind)


def test_a_checkpoint_that_is_already_quantized_is_refused(sd1_folder: Path, tmp_path: Path) -> None:
    folder = copy_folder(sd1_folder, tmp_path)
    amend(folder / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match="the weights in unet/ are already quantized; omit --quantize$"):
        card_of(folder, "int8")


@pytest.mark.parametrize(
    ("kind", "offload", "options"),
    [
        (None, None, "--quantize int8 or nf4, --offload model, another --dtype or --device"),
        ("int8", None, "--quantize nf4, --offload model, another --dtype or --device"),
        ("nf4", None, "--offload model, another --dtype or --device"),
        ("nf4", "model", "another --dtype or --device"),
        (None, "model", "--quantize int8 or nf4, --offload sequential, another --dtype or --device"),
        (None, "sequential", "--quantize int8 or nf4, another --dtype or --device"),
    ],
)
def test_a_model_that_does_not_fit_names_the_options_that_are_not_in_use(kind: Any, offload: Any, options: str) -> None:
    settings = ModelSettings(quantize=kind), ComputeSettings(offload=offload)
    with pytest.raises(SettingsError) as caught, explain_out_of_memory(*settings):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert str(caught.value) == (
        f"the model does not fit into the device's memory: use {options}, or check what else uses that memory (CUDA "
        "out of memory)"
    )


def test_psnr() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert compute_psnr(black, black) == np.inf
    assert compute_psnr(black, black + 255) == 0
    assert compute_psnr(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_the_benchmark_compares_with_the_unquantized_model(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_infer.bench.contenders.MATMUL_SIDE", {"cpu": 64})
    options = ("--rows", "3", "--steps", "2", "--sizes", "native", "--slots", "4", "--threads", "1", "--rounds", "1",
               "--device", "cpu", "--against", "one-by-one", "--model", str(sd1_folder))  # fmt: skip
    done = command("bench", *options, "--quantize", "nf4")
    assert done.code == 0, done.stderr
    assert "weights  " in done.stdout
    assert "PSNR " in done.stdout
    refused = command("bench", "--architecture", "sd15", "--quantize", "nf4")
    assert refused.code == 2
    assert "--quantize compares images, but those of an --architecture are noise" in refused.stderr
