"""Stable Diffusion checkpoints: cards, refused faults, and the outputs of components."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from batch_infer.errors import ModelError
from batch_infer.models import DEMO_MODEL, ModelCard, read_card
from batch_infer.models.latent_diffusion import TEXT_BATCH, EmbeddingCache
from batch_infer.records import SizeRules
from batch_infer.settings import ModelSettings, SchedulerSpec
from tests.checkpoints import amend
from tests.rendering import copy_folder, load_family, make_request

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def card_of(folder: Path, **settings: Any) -> ModelCard:
    return read_card(ModelSettings(name=str(folder), **settings))


@pytest.fixture
def copy(sd1_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to modify."""
    return copy_folder(sd1_folder, tmp_path)


@pytest.fixture(scope="module")
def sd1(sd1_folder: Path) -> Any:
    return load_family(sd1_folder)


# The card


def test_the_built_in_model_needs_no_name() -> None:
    card = read_card(ModelSettings())
    assert card.path == DEMO_MODEL
    assert card.family == "stable_diffusion"
    assert card.has_checker
    assert card.sizes == SizeRules(64, 64, 8, 16)


def test_the_cards_of_both_versions(sd1_folder: Path, sd2_folder: Path) -> None:
    first, second = card_of(sd1_folder), card_of(sd2_folder)
    assert (first.scheduler_name, second.scheduler_name) == ("PNDMScheduler", "DDIMScheduler")
    assert (first.has_checker, second.has_checker) == (True, False)
    assert first.sizes.native_width == first.sizes.native_height == 64
    assert first.sizes.max_side == 512
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_the_fingerprint_changes_with_one_weight(copy: Path, component: str) -> None:
    before = card_of(copy)
    (file,) = (copy / component).glob("*.safetensors")
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    after = card_of(copy)
    assert after.fingerprint != before.fingerprint
    assert after.checker_fingerprint == before.checker_fingerprint


def test_the_fingerprint_changes_with_vocabulary_and_configs_but_not_with_the_path(copy: Path, tmp_path: Path) -> None:
    before = card_of(copy)
    moved = Path(shutil.move(copy, tmp_path / "moved"))
    assert card_of(moved).fingerprint == before.fingerprint
    plain = moved / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(plain, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert card_of(moved).fingerprint == before.fingerprint, "files of a variant that is not loaded do not count"
    weights = load_file(plain)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, plain.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    assert card_of(moved, variant="fp16").fingerprint != before.fingerprint
    amend(moved / "vae" / "config.json", scaling_factor=0.5)
    configured = card_of(moved).fingerprint
    assert configured != before.fingerprint
    amend(moved / "tokenizer" / "tokenizer_config.json", model_max_length=40)
    assert card_of(moved).fingerprint != configured


def test_a_missing_variant_is_refused(copy: Path) -> None:
    with pytest.raises(ModelError, match="has no weights of variant bf16"):
        card_of(copy, variant="bf16")


def test_scheduler_and_checker_have_separate_fingerprints(copy: Path) -> None:
    before = card_of(copy)
    amend(copy / "scheduler" / "scheduler_config.json", beta_end=0.02)
    amend(copy / "safety_checker" / "config.json", note="changed")
    after = card_of(copy)
    assert after.fingerprint == before.fingerprint
    assert after.scheduler_fingerprint != before.scheduler_fingerprint
    assert after.checker_fingerprint != before.checker_fingerprint
    karras = SchedulerSpec.parse("EulerDiscreteScheduler:use_karras_sigmas=true")
    chosen = card_of(copy, scheduler=karras)
    assert chosen.scheduler_name == str(karras)
    assert chosen.scheduler_fingerprint != after.scheduler_fingerprint


# Refused checkpoints


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / TEXT), folder / "text_encoder" / "pytorch_model.bin")
    (folder / TEXT).unlink()


def add_code(folder: Path) -> None:
    (folder / "unet" / "mine.py").write_text("raise SystemExit('ran')", "utf-8")
    amend(folder / "model_index.json", unet=["mine", "UNet"])


def add_pipeline_code(folder: Path) -> None:
    (folder / "pipeline.py").write_text("raise SystemExit('ran')", "utf-8")
    amend(folder / "model_index.json", _class_name=["pipeline", "StableDiffusionPipeline"])


def truncate(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:2000])


def remove_a_weight(folder: Path, file: str) -> None:
    weights = load_file(folder / file)
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / file, metadata={"format": "pt"})


def add_a_weight(folder: Path, file: str) -> None:
    save_file({**load_file(folder / file), "strange": torch.zeros(1)}, folder / file, metadata={"format": "pt"})


def write_lfs_pointer(folder: Path, file: str) -> None:
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "utf-8")


def name_a_missing_shard(folder: Path) -> None:
    index = folder / f"{UNET}.index.json"
    index.write_text(
        '{"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"}}', "utf-8"
    )


def rename_weights(folder: Path, file: str) -> None:
    weights = {f"other.{name}": weight for name, weight in load_file(folder / file).items()}
    save_file(weights, folder / file, metadata={"format": "pt"})


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (pickle_weights, "text_encoder/pytorch_model.bin is pickled.*convert the checkpoint"),
    "code in the folder": (add_code, "unet is .*only classes of diffusers and transformers"),
    "a custom pipeline": (add_pipeline_code, "only pipeline classes of diffusers are supported"),
    "another pipeline": (
        lambda f: amend(f / "model_index.json", _class_name="FluxPipeline"),
        "could not be loaded: .*FluxPipeline.* expected",
    ),
    "no pipeline": (lambda f: amend(f / "model_index.json", _class_name=None), "is a None"),
    "an empty component": (lambda f: amend(f / "model_index.json", vae=[]), "vae is"),
    "an unnamed component": (lambda f: amend(f / "model_index.json", vae=[None, None]), "names no vae"),
    "a missing component": (lambda f: shutil.rmtree(f / "vae"), "names vae/, which is missing"),
    "a path outside the folder": (
        lambda f: amend(f / "model_index.json", **{"../sd1/vae2": ["diffusers", "AutoencoderKL"]}),
        "only classes of diffusers and transformers",
    ),
    "no configuration": (lambda f: (f / "unet" / "config.json").unlink(), "unet/config.json is missing"),
    "no sizes": (
        lambda f: amend(f / "unet" / "config.json", sample_size="8"),
        "unet/config.json has sample_size='8', but",
    ),
    "no scheduler": (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json is miss"),
    "no vocabulary": (lambda f: empty(f / "tokenizer"), "tokenizer/ has none of tokenizer.json"),
    "an index that is not JSON": (lambda f: (f / "model_index.json").write_text("{", "utf-8"), "is not JSON"),
    "an index that is a list": (lambda f: (f / "model_index.json").write_text("[]", "utf-8"), "is not a JSON object"),
    "half a UNet": (
        lambda f: truncate(f, UNET),
        "unet/diffusion_pytorch_model.* is damaged or incomplete; download it again",
    ),
    "half a text encoder": (lambda f: truncate(f, TEXT), "text_encoder/model.safetensors is damaged or incomplete"),
    "a missing last byte": (
        lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-1]),
        "unet/diffusion_pytorch_model.safetensors is damaged or incomplete",
    ),
    "a pointer": (lambda f: write_lfs_pointer(f, UNET), "a Git LFS pointer: download the weights with `git lfs pull`"),
    "a page of text": (lambda f: (f / UNET).write_text("not found"), "is damaged or incomplete"),
    "a missing shard": (name_a_missing_shard, "00002-of-00002.safetensors is missing"),
    "code named by a config": (
        lambda f: amend(f / "text_encoder" / "config.json", auto_map={"AutoModel": "m.Model"}),
        "text_encoder/config.json would run code .auto_map.: batch-infer does not run code from a checkpoint",
    ),
    "an Auto class": (
        lambda f: amend(f / "model_index.json", text_encoder=["transformers", "AutoModel"]),
        "text_encoder is of class AutoModel, which loads any class",
    ),
    "an adapter": (
        lambda f: (f / "text_encoder" / "adapter_config.json").write_text("{}"),
        "text_encoder/ contains an adapter; merge it",
    ),
    "a shard outside the folder": (
        lambda f: (f / f"{UNET}.index.json").write_text('{"weight_map": {"a": "../../out.safetensors"}}', "utf-8"),
        "names ../../out.safetensors, which is not a shard",
    ),
    "weights of a variant alone": (
        lambda f: (f / UNET).rename(f / "unet" / "diffusion_pytorch_model.fp16.safetensors"),
        "unet/ has only weights of a variant .*: set --variant",
    ),
    "no index": (lambda f: (f / "model_index.json").unlink(), "not a diffusers folder"),
}
UNLOADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / UNET).unlink(), "could not be loaded"),
    "another width": (
        lambda f: amend(f / "unet" / "config.json", cross_attention_dim=48),
        "unet/config.json has cross_attention_dim=48, but the total hidden_size of text_encoder is 32",
    ),
    "a UNet without a weight": (lambda f: remove_a_weight(f, UNET), r"unet lacks 1 tensor \(conv_in.bias\)"),
    "a UNet with an extra weight": (lambda f: add_a_weight(f, UNET), r"unet has 1 unexpected tensor \(strange\)"),
    "a text encoder without a weight": (lambda f: remove_a_weight(f, TEXT), r"text_encoder lacks 1 tensor \("),
    "a checker without a weight": (
        lambda f: remove_a_weight(f, "safety_checker/model.safetensors"),
        "safety_checker lacks 1 tensor",
    ),
    "a checker with renamed weights": (
        lambda f: rename_weights(f, "safety_checker/model.safetensors"),
        "safety_checker lacks 44 tensors \\(.*, \\.\\.\\.\\)",
    ),
    "an unknown class": (lambda f: amend(f / "model_index.json", unet=["diffusers", "Nothing"]), "Nothing"),
    "a distilled UNet": (lambda f: amend(f / "unet" / "config.json", time_cond_proj_dim=8), "cond_proj.weight"),
    "a class-conditional UNet": (
        lambda f: amend(f / "unet" / "config.json", class_embed_type="timestep"),
        "class_embed_type",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_refused_on_reading(copy: Path, case: str) -> None:
    damage, reason = FAULTS[case]
    damage(copy)
    with pytest.raises(ModelError, match=reason) as exc_info:
        card_of(copy)
    assert str(copy) in str(exc_info.value)
    assert "\n" not in str(exc_info.value)


@pytest.mark.parametrize("case", UNLOADABLE)
def test_faults_are_refused_on_loading(copy: Path, case: str) -> None:
    damage, reason = UNLOADABLE[case]
    damage(copy)
    with pytest.raises(ModelError, match=reason) as exc_info:
        load_family(copy, with_checker=True)
    assert str(copy) in str(exc_info.value)
    assert "\n" not in str(exc_info.value)


def test_an_inpainting_checkpoint_is_refused(copy: Path) -> None:
    weights = load_file(copy / UNET)
    weights["conv_in.weight"] = weights["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(weights, copy / UNET)
    amend(copy / "unet" / "config.json", in_channels=9)
    with pytest.raises(ModelError, match="has 9 input and 4 output channels"):
        load_family(copy)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no/such/folder", "neither a model folder"), ("./nothing", "neither a model"), ("nothing", "neither a model")],
)
def test_a_name_without_a_model_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_card(ModelSettings(name=name))


def test_a_component_file_is_not_a_checkpoint(sd1_folder: Path) -> None:
    with pytest.raises(ModelError, match="use a complete checkpoint of Stable Diffusion, or a folder"):
        card_of(sd1_folder / UNET)


def test_a_revision_needs_a_hub_id(copy: Path) -> None:
    for name in (str(copy), None):
        with pytest.raises(ModelError, match="--revision v1 needs a Hugging Face id"):
            read_card(ModelSettings(name=name, revision="v1"))


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        ("NoSuchScheduler", "diffusers has no scheduler NoSuchScheduler; short names are .*dpm\\+\\+ 2m karras"),
        ("HeunScheduler", "diffusers has no scheduler HeunScheduler; did you mean .*HeunDiscreteScheduler"),
        ("EulerDiscretScheduler", "did you mean EulerDiscreteScheduler"),
        ("UNet2DConditionModel", "diffusers has no scheduler UNet2DConditionModel"),
        ("DDIMScheduler:eta=0.0", "DDIMScheduler has no option eta; eta is an argument of its `step` method"),
        ("DDIMScheduler:use_karras_sigmas=true", "DDIMScheduler has no option use_karras_sigmas; it has .*clip_sample"),
        (
            "euler:use_karras_sigma=true",
            "EulerDiscreteScheduler has no option use_karras_sigma; did you mean use_karras_sigmas",
        ),
        ("VQDiffusionScheduler", "cannot be built from this model's scheduler settings"),
        ("FlowMatchEulerDiscreteScheduler", "does not fit: the model was trained for denoising, like its PNDMSched"),
        ("UniPCMultistepScheduler:use_flow_sigmas=true", "does not fit: the model was trained for denoising"),
        ("RePaintScheduler", "not a scheduler for latent diffusion"),
        ("EulerDiscreteScheduler:beta_schedule=none", "cannot be built from this model's scheduler settings"),
    ],
)
def test_unknown_and_unsuitable_schedulers_are_refused(sd1_folder: Path, scheduler: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as exc_info:
        load_family(sd1_folder, scheduler)
    assert "\n" not in str(exc_info.value)


def test_a_scheduler_whose_library_is_missing_names_it(sd1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    class NeedyScheduler:
        """Like diffusers' placeholder for a class whose library is missing."""

        _backends = ("torch", "torchsde")

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", NeedyScheduler)
    with pytest.raises(ModelError, match="DPMSolverSDEScheduler needs torch and torchsde: pip install torch torchsde"):
        load_family(sd1_folder, "DPMSolverSDEScheduler")


# Results of the components


def test_embeddings_equal_those_of_the_pipeline(sd1: Any, sd1_folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd1_folder, dtype=torch.float32)
    request = make_request(prompt="a red circle", negative="green")
    (conditioning,) = sd1.condition([request])
    positive, negative = pipe.encode_prompt("a red circle", "cpu", 1, True, "green")
    contexts = [context["encoder_hidden_states"] for context in conditioning.context]
    assert torch.allclose(torch.stack(contexts), torch.cat([positive, negative]), atol=1e-6)


def test_an_embedding_does_not_depend_on_its_neighbours(sd1_folder: Path) -> None:
    request = make_request(prompt="a red circle", negative="green")
    others = [make_request(prompt=f"{k} blue squares", negative=f"{k} stars") for k in range(2 * TEXT_BATCH)]
    (alone,) = load_family(sd1_folder).condition([request])
    *_, crowded = load_family(sd1_folder).condition([*others, request])
    for mine, theirs in zip(alone.context, crowded.context, strict=True):
        assert mine is not None and theirs is not None
        assert torch.equal(mine["encoder_hidden_states"], theirs["encoder_hidden_states"])


def test_texts_are_encoded_in_one_shape(sd1_folder: Path) -> None:
    model: Any = load_family(sd1_folder)
    shapes = set()
    model.pipeline.text_encoder.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape)))
    for number in (1, TEXT_BATCH, TEXT_BATCH + 1):
        model.condition([make_request(prompt=f"{number} {k}", guidance=1.0) for k in range(number)])
    assert shapes == {(TEXT_BATCH, 77)}


def test_rows_may_have_more_texts_than_the_cache_holds(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd1, "_embeddings", EmbeddingCache(0))
    rows = [make_request(prompt=f"{k} circles", negative=f"{k} squares") for k in range(2 * TEXT_BATCH)]
    assert len(sd1.condition(rows)) == len(rows)
    again = sd1.condition(rows[:1])[0].context[0]["encoder_hidden_states"]
    assert torch.equal(again, sd1.condition(rows[:1])[0].context[0]["encoder_hidden_states"])


def test_rows_without_guidance_have_no_unconditional_part(sd1: Any) -> None:
    guided, unguided = sd1.condition([make_request(guidance=1.001), make_request(guidance=1.0)])
    assert guided.context[1] is not None
    assert unguided.context[1] is None


def test_tokens_are_counted_without_start_and_end(sd1: Any) -> None:
    texts = ["", "circle", "circle " * 75, "circle " * 76]
    conditionings = sd1.condition([make_request(prompt=text) for text in texts])
    counts = [(row.prompt_tokens, row.prompt_truncated) for row in conditionings]
    word_tokens = counts[1][0]
    assert counts[0] == (0, False)
    assert counts[2] == (75 * word_tokens, 75 * word_tokens > 75)
    assert counts[3] == (76 * word_tokens, True)


def test_latents_and_images_have_the_requested_size(sd1: Any) -> None:
    assert sd1.latent_shape(48, 80) == (4, 6, 10)
    assert sd1.decode(torch.zeros(2, 4, 6, 10)).shape == (2, 3, 48, 80)


def test_the_checker_is_loaded_only_on_request(sd1: Any, sd1_folder: Path, sd2_folder: Path) -> None:
    assert sd1.safety_checker is None
    with_checker = load_family(sd1_folder, with_checker=True)
    assert with_checker.safety_checker is not None
    assert with_checker.feature_extractor is not None
    assert load_family(sd2_folder).safety_checker is None
