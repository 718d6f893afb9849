"""Malformed checkpoints either render, or loading refuses them in one sentence. None hangs or fails a row."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batch_infer.errors import ModelError
from batch_infer.models import DEMO_MODEL, AnyPipeline, load_checker, load_solver, load_token_counter, read_card
from batch_infer.models.schedulers import refuse_unknown_scheduler
from batch_infer.models.untrusted import MAX_DEPTH, loading_errors, parse_json
from batch_infer.records import SizeRules
from batch_infer.safety.checker import StableDiffusionChecker
from batch_infer.settings import SHORT_NAMES, ModelSettings, SchedulerSpec
from tests import pipelines
from tests.checkpoints import amend
from tests.pipelines.saved import make_t5, make_vae
from tests.rendering import CPU, copy_folder, load_family, make_request, render
from tests.runs import results, run

DEEP = "[" * 5000 + "]" * 5000
NO_KEY = object()
UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
VOCABULARY = "tokenizer/vocab.json"
CHECKER, PROCESSOR = "safety_checker/config.json", "feature_extractor/preprocessor_config.json"

REFUSED: list[tuple[str, str, Any]] = [
    *((UNET, "sample_size", value) for value in (10**9, 0, -8, "8", 8.5, [8, 8, 8], True)),
    *((UNET, "layers_per_block", value) for value in (10**7, "x", -1, [10**7, 1])),
    *((UNET, "norm_num_groups", value) for value in (0, 7, "x", -1)),
    *((UNET, "cross_attention_dim", value) for value in (0, 48, 10**12, "x")),
    *((UNET, "in_channels", value) for value in (0, 9, "x")),
    *((UNET, "attention_head_dim", value) for value in (0, "x", {"a": 1})),
    *((UNET, "block_out_channels", value) for value in ([], [32] * 1000, "x", [32, 0])),
    (UNET, "transformer_layers_per_block", 10**8),
    (UNET, "down_block_types", ["NoSuchBlock", "DownBlock2D"]),
    (UNET, "act_fn", "nothing"),
    *((VAE, "scaling_factor", value) for value in ("x", 0, float("nan"), float("inf"), [1])),
    *((VAE, "latent_channels", value) for value in (3, 16, 0, "4")),
    *((VAE, "block_out_channels", value) for value in ([8] * 64, "x", [])),
    (VAE, "layers_per_block", 10**7),
    (VAE, "norm_num_groups", 0),
    *((TEXT, "hidden_act", value) for value in ("nothing", 5)),
    *((TEXT, "num_hidden_layers", value) for value in (10**7, -1, "x")),
    *((TEXT, "num_attention_heads", value) for value in (0, 5)),
    *((TEXT, "max_position_embeddings", value) for value in (10**9, 0, 5, "x")),
    *((TEXT, "vocab_size", value) for value in (10**9, 3, "x")),
    *((TEXT, "hidden_size", value) for value in (48, 0, [32])),
    *((TEXT, "attn_implementation", value) for value in ("kernels-community/flash-attn", {"": "flash_attention_2"})),
    *((TEXT, f"_{key}_implementation_internal", "someone/kernel") for key in ("attn", "experts")),
    (TEXT, "_attn_implementation", "kernels-community/flash-attn"),
    *((TOKENIZER, "model_max_length", value) for value in (0, 1, 2, -5, "x", 77.5, True, [77], float("inf"))),
    (TOKENIZER, "pad_token", "<a token without an embedding>"),
    (TOKENIZER, "pad_token", 5),
    (TOKENIZER, "added_tokens_decoder", {"x": {"content": "a"}}),
    (TOKENIZER, "auto_map", {"AutoTokenizer": "mine.Tokenizer"}),
    *((SCHEDULER, "prediction_type", value) for value in ("nonsense", 5)),
    *((SCHEDULER, "num_train_timesteps", value) for value in (0, -1, 10**9, "x", 1.5)),
    *((SCHEDULER, "beta_start", value) for value in ("x", float("nan"))),
    *((SCHEDULER, "beta_schedule", value) for value in ("nonsense", 5)),
    (SCHEDULER, "steps_offset", "x"),
    *((PROCESSOR, "crop_size", value) for value in (10**6, {"height": 10**6, "width": 10**6}, 16, "x", 0)),
    *((PROCESSOR, "image_mean", value) for value in ("x", [0.5], None)),
    *((CHECKER, key, 10**7) for key in ("projection_dim",)),
]
"""File, key and value in a Stable Diffusion 1.x checkpoint."""
ACCEPTED: list[tuple[str, str, Any]] = [
    *((TOKENIZER, "model_max_length", value) for value in (1e30, 10**9, NO_KEY, 77.0)),
    (UNET, "sample_size", None),
    (UNET, "sample_size", NO_KEY),
    (UNET, "sample_size", [8, 8]),
    (SCHEDULER, "prediction_type", NO_KEY),
]
QUICK = [case for number, case in enumerate(REFUSED) if number % 5 == 0]


def put(path: Path, key: str, value: Any) -> None:
    """Set a key of a JSON file, or remove it."""
    content = json.loads(path.read_text("utf-8"))
    content.pop(key, None)
    path.write_text(json.dumps(content if value is NO_KEY else {**content, key: value}), "utf-8")


def load_all(folder: Path) -> Any:
    """Load everything that a plan and a worker load before the first row."""
    card = read_card(ModelSettings(name=str(folder)))
    load_token_counter(card)
    load_solver(card)
    return load_family(folder, with_checker=card.has_checker)


@pytest.fixture
def copy(sd1_folder: Path, tmp_path: Path) -> Path:
    return copy_folder(sd1_folder, tmp_path)


def assert_refused(copy: Path, file: str, key: str, value: Any) -> None:
    put(copy / file, key, value)
    with pytest.raises(ModelError) as exc_info:
        load_all(copy)
    message = str(exc_info.value)
    assert "\n" not in message
    assert file.split("/")[0] in message, message


@pytest.mark.parametrize(("file", "key", "value"), QUICK)
def test_a_malformed_value_is_refused_at_load(copy: Path, file: str, key: str, value: Any) -> None:
    assert_refused(copy, file, key, value)


@pytest.mark.promises
@pytest.mark.parametrize(("file", "key", "value"), REFUSED)
def test_every_malformed_value_is_refused_at_load(copy: Path, file: str, key: str, value: Any) -> None:
    assert_refused(copy, file, key, value)


@pytest.mark.parametrize(("file", "key", "value"), ACCEPTED)
def test_harmless_values_render_the_same_image(copy: Path, sd1_folder: Path, file: str, key: str, value: Any) -> None:
    put(copy / file, key, value)
    counter = load_token_counter(read_card(ModelSettings(name=str(copy))))
    assert counter is not None
    assert counter.max_tokens == 75
    request = make_request(prompt="a red circle " * 100, steps=2)
    image, expected = (render(load_all(folder), [request])["row"].pixels for folder in (copy, sd1_folder))
    assert np.array_equal(image, expected)


def test_a_unet_without_a_size_has_the_default_size_of_its_family(
    copy: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    put(copy / UNET, "sample_size", None)
    assert read_card(ModelSettings(name=str(copy))).sizes == SizeRules(512, 512, 8, 16)
    large = copy_folder(sdxl_folder, tmp_path)
    put(large / UNET, "sample_size", None)
    assert read_card(ModelSettings(name=str(large))).sizes.native_width == 1024


def write_header(path: Path, header: str) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())


HEADERS = {
    "deep": f'{{"a": {DEEP}}}',
    "a negative shape": '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}',
    "a huge shape": '{"a": {"dtype": "F32", "shape": [999999999999999], "data_offsets": [0, 0]}}',
    "negative offsets": '{"a": {"dtype": "F32", "shape": [0], "data_offsets": [-4, 0]}}',
    "offsets in text": '{"a": {"dtype": "F32", "shape": [0], "data_offsets": ["0", "0"]}}',
    "a shape in text": '{"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 0]}}',
    "a list": "[]",
    "numbers": '{"a": 5}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_malformed_header_is_refused(copy: Path, case: str) -> None:
    write_header(copy / "vae" / "diffusion_pytorch_model.safetensors", HEADERS[case])
    with pytest.raises(ModelError, match="vae/diffusion_pytorch_model.safetensors"):
        read_card(ModelSettings(name=str(copy)))


@pytest.mark.parametrize(
    "file", ["model_index.json", UNET, SCHEDULER, TOKENIZER, VOCABULARY, PROCESSOR, "unet/x.safetensors.index.json"]
)
@pytest.mark.parametrize("content", [DEEP, '{"a": ' * 200 + "1" + "}" * 200, "\ufeff{}", "{", "[1]"])
def test_a_file_without_a_json_object_is_refused(copy: Path, file: str, content: str) -> None:
    if (file, content) == (VOCABULARY, "[1]"):
        pytest.skip("tokenizer.json is read instead")
    (copy / file).write_text(content, "utf-8")
    with pytest.raises(ModelError):
        load_all(copy)


def test_the_depth_of_json_is_limited() -> None:
    assert parse_json(b'{"a": [1, {"b": null}]}', "x") == {"a": [1, {"b": None}]}
    parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "x")
    for depth in (MAX_DEPTH + 1, 10**6):
        with pytest.raises(ModelError, match="x is nested more than"):
            parse_json(b"[" * depth + b"]" * depth, "x")


@pytest.mark.parametrize(
    "error",
    [ImportError("a"), KeyError("a"), IndexError("a"), ZeroDivisionError("a"), RecursionError("a"), MemoryError("a"),
     OverflowError("a"), NotImplementedError("a"), AssertionError("a"), Exception("as tokenizers raises")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_library_errors_name_the_component(error: Exception) -> None:
    with pytest.raises(ModelError, match="unet could not be loaded: "), loading_errors("unet"):
        raise error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("CUDA error: unknown"), StopIteration()])
def test_device_errors_and_other_errors_are_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, loading_errors("unet"):
        raise error
    assert raised.value is error


def add_escaped_key(path: Path, key: str) -> None:
    """Add a key to a JSON file, with its first character escaped."""
    content = path.read_text("utf-8").strip()
    path.write_text(f'{{"\\u{ord(key[0]):04x}{key[1:]}": {{"AutoModel": "m.M"}}, {content[1:]}', "utf-8")


def test_an_escaped_key_is_refused(copy: Path) -> None:
    add_escaped_key(copy / TEXT, "auto_map")
    assert "auto_map" not in (copy / TEXT).read_text("utf-8")
    with pytest.raises(
        ModelError,
        match="text_encoder/config.json would run code .auto_map.: batch-infer does not run code from a checkpoint",
    ):
        read_card(ModelSettings(name=str(copy)))


def test_a_vocabulary_may_contain_refused_keys(copy: Path) -> None:
    (copy / "tokenizer" / "vocab.json").write_text('{"auto_map": 7, "quantization_config": 8}', "utf-8")
    read_card(ModelSettings(name=str(copy)))


CODE_SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    (TEXT, {"_attn_implementation_internal": "someone/kernel"}, "_attn_implementation_internal='someone/kernel'"),
    (TEXT, {"attribute_map": {"a": "_attn_implementation"}, "a": "someone/kernel"}, "renames settings"),
    (TEXT, {"use_kernels": True}, "would fetch and run kernels .use_kernels."),
    (TEXT, {"kernel_config": {"kernel_mapping": {"GeLU": "someone/kernel:GeLU"}}}, "would fetch and run kernels"),
    (TEXT, {"transformers_weights": "adapter_model.bin"}, "would load unchecked weights .transformers_weights."),
    (TOKENIZER, {"gguf_file": "words.gguf", "name_or_path": "someone/words"}, "would load an unchecked tokenizer"),
    (PROCESSOR, {"audio_tokenizer": {"audio_tokenizer_name_or_path": "someone/model"}}, "would load another model"),
    *(
        (file, {"quantization_config": {"quant_method": method}}, f"has quant_method '{method}', which may")
        for file, method in ((UNET, "nunchaku_lite"), (UNET, "gguf"), (TEXT, "fp8"), (TEXT, "mxfp4"), (TEXT, "custom"))
    ),
    (UNET, {"quantization_config": {"load_in_8bit": True}}, "has quant_method None"),
]


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(("file", "keys", "reason"), CODE_SETTINGS)
def test_a_setting_that_loads_code_is_refused_at_any_depth(
    copy: Path, file: str, keys: dict[str, Any], reason: str, depth: int
) -> None:
    for _ in range(depth):
        keys = {"text_config": keys}
    amend(copy / file, **keys)
    with pytest.raises(ModelError, match=f"{file} (has|has a|)[ ]?{reason}"):
        read_card(ModelSettings(name=str(copy)))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantized_weights_need_the_package_of_their_method(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amend(copy / UNET, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ModelError, match="unet/config.json has .* 'bitsandbytes': pip install bitsandbytes"):
        read_card(ModelSettings(name=str(copy)))
    (copy / "bitsandbytes").mkdir()
    monkeypatch.syspath_prepend(copy)
    read_card(ModelSettings(name=str(copy)))


@pytest.mark.parametrize("file", ["tokenizer/merges.txt", "tokenizer/notes.txt", "unet/x.json", "unet/x.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_named(copy: Path, file: str) -> None:
    (copy / file).unlink(missing_ok=True)
    (copy / file).mkdir()
    with pytest.raises(ModelError, match=f"{re.escape(file)} .*: .*Is a directory"):
        read_card(ModelSettings(str(copy)))


def test_a_tokenizer_without_its_merges_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    shutil.copytree(DEMO_MODEL / "tokenizer", copy / "tokenizer", ignore=shutil.ignore_patterns("tokenizer.json"))
    read_card(ModelSettings(name=str(copy)))
    (copy / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ModelError, match="tokenizer/ lacks vocab.json or merges.txt; is the folder complete"):
        read_card(ModelSettings(name=str(copy)))


def damage_xl(folder: Path) -> str:
    amend(folder / UNET, cross_attention_dim=32)
    return "has cross_attention_dim=32, but the total hidden_size of text_encoder and text_encoder_2 is 80"


def damage_sd3(folder: Path) -> str:
    amend(folder / "transformer" / "config.json", pooled_projection_dim=8)
    return (
        "transformer/config.json has pooled_projection_dim=8, but the total projection_dim of both text encoders is 32"
    )


def damage_positions(folder: Path) -> str:
    amend(folder / "transformer" / "config.json", pos_embed_max_size=8000)
    return "transformer/config.json has pos_embed_max_size=8000, but the longest side of its tensors is"


def damage_t5(folder: Path) -> str:
    amend(folder / "text_encoder_3" / "config.json", d_model=48)
    return "transformer/config.json has joint_attention_dim=32, but text_encoder_3 has d_model 48"


def damage_decidiffusion(folder: Path) -> str:
    path = folder / "flexible_unet" / "config.json"
    content = json.loads(path.read_text("utf-8"))
    content["configurations"]["mid_num_resnets"] = 10**8
    path.write_text(json.dumps(content), "utf-8")
    return "flexible_unet/config.json has mid_num_resnets=100000000, but its weights have only"


@pytest.mark.parametrize("damage", [damage_xl, damage_sd3, damage_positions, damage_t5, damage_decidiffusion])
def test_faults_of_other_families_are_refused(
    damage: Callable[[Path], str], sdxl_folder: Path, decidiffusion_folder: Path, tmp_path: Path
) -> None:
    source = {"damage_xl": sdxl_folder, "damage_decidiffusion": decidiffusion_folder}.get(damage.__name__)
    copy = copy_folder(source, tmp_path) if source else pipelines.save_sd3(tmp_path / "sd3")
    reason = damage(copy)
    with pytest.raises(ModelError, match=reason):
        read_card(ModelSettings(name=str(copy)))


def test_a_pipelines_tokenizer_has_the_limit_of_its_encoder(tmp_path: Path) -> None:
    copy = pipelines.save_sd3(tmp_path / "sd3", with_t5=False)
    for name in ("tokenizer", "tokenizer_2"):
        put(copy / name / "tokenizer_config.json", "model_max_length", NO_KEY)
    model = load_family(copy)
    assert model.pipeline.tokenizer.model_max_length == model.pipeline.tokenizer_max_length == 77


PIPELINE_FAULTS: list[tuple[str, str, Any]] = [
    ("transformer/config.json", "num_layers", 10**8),
    ("transformer/config.json", "sample_size", 10**9),
    ("transformer/config.json", "sample_size", "x"),
    ("transformer/config.json", "cross_attention_dim", 10**6),
    ("transformer/config.json", "norm_type", "nothing"),
    ("transformer/config.json", "quantization_config", {"quant_method": "nothing"}),
    ("text_encoder/config.json", "attn_implementation", "kernels-community/flash-attn"),
    ("vae/config.json", "block_out_channels", 5),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
    ("scheduler/scheduler_config.json", "prediction_type", "nonsense"),
]


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save_pixart(tmp_path_factory.mktemp("pipelines") / "pixart")


@pytest.mark.parametrize(("file", "key", "value"), PIPELINE_FAULTS)
def test_a_malformed_value_in_a_pipeline_without_a_family_is_refused_at_load(
    pixart: Path, tmp_path: Path, file: str, key: str, value: Any
) -> None:
    copy = copy_folder(pixart, tmp_path)
    put(copy / file, key, value)
    with pytest.raises(ModelError) as exc_info:
        card = read_card(ModelSettings(name=str(copy)))
        AnyPipeline.load(card, CPU, torch.float32, with_checker=False)
    assert "\n" not in str(exc_info.value)


def test_a_pipeline_whose_components_do_not_fit_is_refused_at_load(pixart: Path, tmp_path: Path) -> None:
    copy = copy_folder(pixart, tmp_path)
    shutil.rmtree(copy / "text_encoder")
    make_t5(32).save_pretrained(copy / "text_encoder")
    card = read_card(ModelSettings(name=str(copy)))
    with pytest.raises(ModelError, match="PixArtSigmaPipeline could not be loaded: .*shapes"):
        AnyPipeline.load(card, CPU, torch.float32, with_checker=False)


def test_a_pipeline_whose_decoder_does_not_fit_is_refused_at_load(pixart: Path, tmp_path: Path) -> None:
    copy = copy_folder(pixart, tmp_path)
    shutil.rmtree(copy / "vae")
    make_vae(latent_channels=3).save_pretrained(copy / "vae")
    with pytest.raises(ModelError, match="vae of PixArtSigmaPipeline could not be loaded: "):
        card = read_card(ModelSettings(name=str(copy)))
        AnyPipeline.load(card, CPU, torch.float32, with_checker=False)


def test_a_run_refuses_a_fault_before_any_row_in_one_message(copy: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("prompt\na red circle\n")
    put(copy / TOKENIZER, "pad_token", "<new>")
    result = run(table, out, "--model", copy)
    assert result.code == 2
    assert "token '<new>' has id 645, but text_encoder has only 645 embeddings" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (out / "results.parquet").exists()


def test_without_a_safety_check_the_checker_may_be_missing(copy: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("prompt\na red circle\n")
    for name in ("safety_checker", "feature_extractor"):
        shutil.rmtree(copy / name)
    refused = run(table, out, "--model", copy)
    assert refused.code == 2
    assert "feature_extractor/, which is missing" in refused.stderr
    assert run(table, out, "--model", copy, "--safety", "none").code == 0
    assert results(out)[0]["status"] == "ok"


def test_the_recorded_scheduler_is_the_one_that_is_loaded(copy: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("prompt\na red circle\n")
    before = read_card(ModelSettings(name=str(copy))).scheduler_fingerprint
    amend(copy / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    card = read_card(ModelSettings(name=str(copy)))
    assert (card.scheduler_name, card.scheduler_fingerprint) == ("DDIMScheduler", before)
    assert load_solver(card).name == "DDIMScheduler"
    assert run(table, out, "--model", copy).code == 0
    assert results(out)[0]["scheduler"] == "DDIMScheduler"


def test_an_image_does_not_depend_on_the_name_of_the_models_folder(copy: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("prompt\na red circle\n")
    renamed = copy_folder(copy, tmp_path / "elsewhere").rename(tmp_path / "another name")
    digests = set()
    for folder in (copy, renamed):
        assert run(table, tmp_path / folder.name / "out", "--model", folder, "--overwrite").code == 0
        digests.add(results(tmp_path / folder.name / "out")[0]["sha256"])
    assert len(digests) == 1


@pytest.mark.parametrize("short", SHORT_NAMES)
def test_short_names_of_schedulers_exist_in_the_installed_diffusers(sd1_folder: Path, short: str) -> None:
    spec = SchedulerSpec.parse(short)
    refuse_unknown_scheduler(spec)
    card = read_card(ModelSettings(name=str(sd1_folder), scheduler=spec))
    assert card.scheduler_name.startswith(SHORT_NAMES[short][0])
    assert load_solver(card).name == SHORT_NAMES[short][0]


def test_a_loaded_checker_gives_verdicts(copy: Path) -> None:
    card = read_card(ModelSettings(name=str(copy)))
    checker = StableDiffusionChecker(*load_checker(card, CPU, torch.float32), 1)
    assert checker.check([np.zeros((64, 64, 3), np.uint8)])
