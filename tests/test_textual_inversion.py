"""Textual inversion embeddings are loaded as in diffusers, change the fingerprint, and are refused if unfit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batch_infer.chain import BatchSizes, RenderedImage, StepLevelChain
from batch_infer.errors import ModelError, SettingsError
from batch_infer.models import AnyPipeline, ModelCard, load_latent_diffusion, load_token_counter, read_card
from batch_infer.settings import EmbeddingSpec, ModelSettings
from tests.checkpoints import amend
from tests.oracle import assert_close, call_diffusers, load_pipeline
from tests.pipelines import SAVE_FUNCTIONS
from tests.pipelines.parts import WIDTH
from tests.rendering import CPU, copy_folder, make_request, max_difference, render
from tests.runs import command, results, run, run_json

ONE, MANY = "<cat-toy>", "watery_style"
ROWS = (
    make_request("plain", "a red circle", steps=3, seed=1),
    make_request("one", f"a {ONE} on a blue square", steps=3, seed=1),
    make_request("many", f"a circle in {MANY}", steps=4, seed=2),
    make_request("both", f"{MANY}, {ONE}", steps=3, negative=f"green {MANY}", seed=3),
    make_request("unguided", f"a star, {MANY}", steps=3, guidance=1.0, seed=4),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Embeddings for tiny checkpoints: one vector that the file names, and three in A1111's format."""
    folder, random = tmp_path_factory.mktemp("embeddings"), torch.Generator().manual_seed(0)
    tensors = {
        "toy": {ONE: torch.randn(32, generator=random)},
        MANY: {"emb_params": torch.randn(3, 32, generator=random)},
        "wide": {"emb_params": torch.randn(1, 768, generator=random)},
        "circle": {"emb_params": torch.randn(1, 32, generator=random)},
        "nan": {"emb_params": torch.full((1, 32), torch.nan)},
        "flux": {"emb_params": torch.randn(2, WIDTH, generator=random)},
    }
    for name, content in tensors.items():
        save_file(content, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in tensors}


def card_of(folder: Path, *files: Path | str, **settings: Any) -> ModelCard:
    specs = tuple(EmbeddingSpec.parse(str(file)) for file in files)
    return read_card(ModelSettings(name=str(folder), embeddings=specs, **settings))


def load_model(folder: Path, *files: Path | str) -> Any:
    return load_latent_diffusion(card_of(folder, *files), CPU, torch.float32, with_checker=False)


def load_reference(folder: Path, files: dict[str, Path]) -> Any:
    pipe = load_pipeline(folder)
    pipe.load_textual_inversion(str(files["toy"]))
    pipe.load_textual_inversion(str(files[MANY]), token=MANY)
    return pipe


def test_images_equal_those_of_diffusers(sd1_folder: Path, files: dict[str, Path]) -> None:
    theirs, plain = load_reference(sd1_folder, files), load_pipeline(sd1_folder)
    rendered = render(load_model(sd1_folder, files["toy"], files[MANY]), ROWS)
    for row in ROWS:
        assert_close(rendered[row.id].pixels, call_diffusers(theirs, row)[0])
        difference = max_difference(rendered[row.id].pixels, call_diffusers(plain, row)[0])
        assert (difference <= 1) == (row.id == "plain")


def test_every_vector_has_a_row_in_the_encoder(sd1_folder: Path, files: dict[str, Path]) -> None:
    model = load_model(sd1_folder, files["toy"], files[MANY])
    tokenizer, weight = model.pipeline.tokenizer, model.pipeline.text_encoder.get_input_embeddings().weight
    ids = tokenizer(f"{MANY} {MANY}_1 {MANY}_2 {ONE}", add_special_tokens=False).input_ids
    expected = [*load_file(files[MANY])["emb_params"], load_file(files["toy"])[ONE]]
    assert torch.equal(weight[ids], torch.stack(expected))
    plain = load_pipeline(sd1_folder).text_encoder.get_input_embeddings().weight
    assert torch.equal(weight[: len(plain)], plain)


def test_tokens_are_counted(sd1_folder: Path, files: dict[str, Path]) -> None:
    """Each vector is a token, for the command `plan` and in the results."""
    card = card_of(sd1_folder, files["toy"], files[MANY])
    counter, model = load_token_counter(card), load_model(sd1_folder, files["toy"], files[MANY])
    assert counter is not None
    texts = ["a circle", f"a {ONE}", f"a {MANY}", f"{MANY} {MANY}", f"{MANY} " * 26]
    expected = [2, 2, 4, 6, 78]
    assert counter.count(texts) == expected
    conditionings = model.condition([make_request(prompt=text) for text in texts])
    assert [one.prompt_tokens for one in conditionings] == expected
    assert [one.prompt_truncated for one in conditionings] == [False] * 4 + [True]
    assert not counter.is_short(f"{MANY} " * 3) or counter.count([f"{MANY} " * 3])[0] <= counter.max_tokens


def test_xl_has_an_embedding_for_each_encoder(sdxl_folder: Path, tmp_path: Path) -> None:
    plain = load_pipeline(sdxl_folder)
    widths = [getattr(plain, name).config.hidden_size for name in ("text_encoder", "text_encoder_2")]
    vectors = {name: torch.randn(2, width) for name, width in zip(("clip_l", "clip_g"), widths, strict=True)}
    path = tmp_path / f"{MANY}.safetensors"
    save_file(vectors, path)
    theirs = load_pipeline(sdxl_folder)
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(theirs, f"{part}{suffix}") for part in ("tokenizer", "text_encoder")}
        theirs.load_textual_inversion({MANY: vectors[name]}, token=MANY, **parts)
    rows = [row for row in ROWS if ONE not in row.prompt]
    rendered = render(load_model(sdxl_folder, path), rows)
    for row in rows:
        assert_close(rendered[row.id].pixels, call_diffusers(theirs, row)[0])
    assert max_difference(rendered["many"].pixels, call_diffusers(plain, rows[1])[0]) > 2


def test_an_xl_file_for_one_encoder_is_refused(sdxl_folder: Path, files: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="toy.safetensors does not fit sdxl; was it made for another family"):
        load_model(sdxl_folder, files["toy"])


def test_pipelines_without_a_family(files: dict[str, Path], tmp_path: Path) -> None:
    folder = SAVE_FUNCTIONS["flux"](tmp_path / "flux")
    card = card_of(folder, f"{files['flux']}:{MANY}")
    model = AnyPipeline.load(card, CPU, torch.float32, with_checker=False)
    request = make_request("many", f"a circle in {MANY}", steps=2)
    request = replace(request, params=replace(request.params, embedded_guidance=True))
    (outcome,) = StepLevelChain(model, BatchSizes(4, 2), None).render([request])
    assert isinstance(outcome, RenderedImage)
    assert outcome.conditioning.prompt_tokens == 5
    theirs, plain = load_pipeline(folder), load_pipeline(folder)
    theirs.load_textual_inversion(str(files["flux"]), token=MANY)
    assert_close(outcome.pixels, call_diffusers(theirs, request)[0])
    assert max_difference(outcome.pixels, call_diffusers(plain, request)[0]) > 1


def test_the_fingerprint_depends_on_file_and_token(sd1_folder: Path, files: dict[str, Path]) -> None:
    toy, many = files["toy"], files[MANY]
    cards = [card_of(sd1_folder, *paths) for paths in ((), (toy,), (f"{toy}:<other>",), (many,), (toy, many))]
    assert len({card.fingerprint for card in cards}) == len(cards)
    assert cards[-1].title == f"sd1 + {ONE} + {MANY}"
    assert [card.embeddings[0].token for card in cards[1:4]] == [ONE, "<other>", MANY]


def test_a_run_records_its_embeddings(
    sd1_folder: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(f"prompt\na circle in {MANY}\n")
    Path(f"{MANY}.safetensors").write_bytes(files[MANY].read_bytes())
    options = ("--model", sd1_folder, "--safety", "none")
    assert run("t.csv", tmp_path / "out", *options, "--embedding", f"{MANY}.safetensors").code == 0
    (embedding,) = run_json(tmp_path / "out")["model"]["embeddings"]
    assert (embedding["path"], embedding["token"]) == (str(tmp_path / f"{MANY}.safetensors"), MANY)
    (row,) = results(tmp_path / "out")
    assert row["prompt_tokens"] == 6
    assert run("t.csv", tmp_path / "out", *options).code == 2
    (tmp_path / "out" / row["generated_image"]).unlink()
    monkeypatch.chdir("/")
    assert command("retry", tmp_path / "out", "--status", "missing", "--no-progress").code == 0
    (again,) = results(tmp_path / "out")
    assert (again["sha256"], again["attempt"]) == (row["sha256"], 2)


# Refused embeddings


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("{wide}",), "wide.safetensors does not fit sd1; .*its vectors have 768 numbers, but text_encoder takes 32"),
        (("{circle}:circle</w>",), "the tokenizer already has the token 'circle</w>'; give another: FILE"),
        (("{nan}",), "nan.safetensors contains NaN or infinity"),
        (("{toy}", "{circle}:<CAT-toy>2"), "the token '<CAT-toy>2' contains the token '<cat-toy>'; give other tokens"),
        (("{toy}", "{toy}"), "contains the token"),
        (("{toy}:two words",), "'two words' cannot be a token; give another"),
        (("{toy}.missing.safetensors",), "there is no such file"),
    ],
)
def test_unfit_embeddings_are_refused(
    sd1_folder: Path, files: dict[str, Path], arguments: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        load_model(sd1_folder, *[argument.format(**files) for argument in arguments])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "it has 2 tensors instead of one, or of clip_l and clip_g"),
        ({"a": torch.zeros(2, 2, 2)}, r"its shapes are \[\(2, 2, 2\)\]"),
        ({"clip_l": torch.zeros(2, 8), "clip_g": torch.zeros(3, 8)}, "its shapes are"),
        ({"a": torch.zeros(100, 8)}, "has 100 vectors; the maximum is 75"),
        ({"a": torch.zeros(0, 8)}, "has 0 vectors"),
    ],
)
def test_other_files_are_refused(sd1_folder: Path, tmp_path: Path, tensors: Any, reason: str) -> None:
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=reason):
        card_of(sd1_folder, tmp_path / "odd.safetensors")


@pytest.mark.parametrize("text", ["toy.pt", "toy.bin", "toy", "toy.safetensors:", "toy.safetensorsx"])
def test_only_safetensors_are_read(text: str) -> None:
    with pytest.raises(SettingsError, match="expected FILE.safetensors or FILE.safetensors:TOKEN"):
        EmbeddingSpec.parse(text)


def test_models_and_options_without_support_are_refused(
    sd1_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="--embedding and --long-prompts cannot be used together"):
        card_of(sd1_folder, files["toy"], long_prompts=True)
    copy = copy_folder(sd1_folder, tmp_path)
    (copy / "unet").rename(copy / "flexible_unet")
    amend(copy / "model_index.json", _class_name="DeciDiffusionPipeline")
    with pytest.raises(ModelError, match="for which diffusers has no loader of embeddings: leave --embedding out"):
        card_of(copy, files["toy"])
