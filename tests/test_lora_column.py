"""With --lora-folder, rows name their own LoRA, and other rows do not change."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batch_infer.chain import BatchSizes, RenderedImage, StepLevelChain, UnrenderedRow
from batch_infer.errors import RowError
from batch_infer.models import AnyPipeline, LoraFolder, load_latent_diffusion, lora_fusing, read_card
from batch_infer.models.untrusted import hash_file
from batch_infer.planning import BatchingEstimator, order_requests
from batch_infer.records import Lora, PromptRequest, ResultRow, RowCost
from batch_infer.serving.request_queue import RequestQueue
from batch_infer.settings import LoraSpec, ModelSettings
from batch_infer.table import parse_rows
from tests.loras import KOHYA, Tensors, as_kohya, as_peft, make_layers
from tests.oracle import load_pipeline
from tests.paced import MODULE
from tests.pipelines import SAVE_FUNCTIONS
from tests.rendering import CPU, make_request, max_difference, render
from tests.runs import hashes, results, run, run_json, start, wait_for
from tests.tables import RULES, write_csv


@pytest.fixture(scope="module")
def folder(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the LoRAs `both`, `dora` and `text` for `sd1_folder`, and `odd`, which does not fit."""
    pipe, path = load_pipeline(sd1_folder), tmp_path_factory.mktemp("loras")
    layers = make_layers(pipe, "unet", "text_encoder")
    odd = as_peft(layers)
    odd["unet.conv_in.lora_A.weight"] = torch.ones(2, 2)
    files = {
        "both": as_peft(layers),
        "dora": as_kohya(layers, KOHYA, dora=True),
        "text": as_peft(make_layers(pipe, "text_encoder")),
        "odd": odd,
    }
    for name, tensors in files.items():
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path / f"{name}.safetensors")
    (path / "notes.txt").write_text("no LoRA")
    save_file({"conv_in.weight": torch.zeros(1)}, path / "checkpoint.safetensors")
    return path


@pytest.fixture(scope="module")
def model(sd1_folder: Path) -> Any:
    return load_model(sd1_folder)


def load_model(folder: Path, *specs: LoraSpec) -> Any:
    card = read_card(ModelSettings(name=str(folder), loras=specs))
    return load_latent_diffusion(card, CPU, torch.float32, with_checker=False)


def row(name: str, lora: Lora | None = None, **settings: Any) -> PromptRequest:
    return replace(make_request(name, **settings), lora=lora)


def weights_of(model: Any) -> Tensors:
    return {
        f"{name}.{key}": weight.clone()
        for name in ("unet", "text_encoder")
        for key, weight in getattr(model.pipeline, name).state_dict().items()
    }


# Cells


@pytest.mark.parametrize(
    ("cell", "stem", "weight"), [("both", "both", 1.0), (" both:0.5 ", "both", 0.5), ("both:-1e-1", "both", -0.1)]
)
def test_a_cell_names_a_file_and_a_weight(folder: Path, cell: str, stem: str, weight: float) -> None:
    lora = LoraFolder(str(folder)).find(cell)
    assert (lora.path, lora.weight) == (folder / f"{stem}.safetensors", weight)
    assert pickle.loads(pickle.dumps(row("a", lora))) == row("a", lora)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("unknown", "lora 'unknown': there is no unknown.safetensors in /"),
        ("both.safetensors", "there is no both.safetensors.safetensors"),
        ("both:x", "lora 'both:x': the weight 'x' is not a finite number"),
        ("both:inf", "the weight 'inf' is not a finite number"),
        ("both:", "the weight '' is not a finite number"),
        (":1", "lora '' is not a valid name: write a file's name without .safetensors"),
        ("../loras/both", "is not a valid name"),
        ("sub/both", "is not a valid name"),
        ("..", "is not a valid name"),
        ("a\\b", "is not a valid name"),
        ("x" * 5000, "is not a valid name"),
        ("both\0", "is not a valid name"),
        ("checkpoint", "is not a LoRA: none of its tensors"),
    ],
)
def test_other_cells_are_refused(folder: Path, cell: str, reason: str) -> None:
    with pytest.raises(RowError) as error:
        LoraFolder(str(folder)).find(cell)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_fingerprints_depend_on_file_and_weight(folder: Path) -> None:
    find = LoraFolder(str(folder)).find

    def fingerprint(cell: Any, *, find_lora: Any = find) -> str:
        (request,) = parse_rows([{"prompt": "x", "lora": cell}], {}, RULES, find_lora)
        return request.fingerprint

    plain = next(parse_rows([{"prompt": "x"}], {}, RULES)).fingerprint
    assert fingerprint(None) == fingerprint("") == fingerprint("  ") == fingerprint("both", find_lora=None) == plain
    names = [plain, *map(fingerprint, ("both", "both:0.5", "dora"))]
    assert len(set(names)) == len(names)
    assert fingerprint("both") == fingerprint("both:1")


def test_other_cells_give_invalid_rows(folder: Path) -> None:
    rows = [{"prompt": "x", "lora": cell} for cell in ("both", "none", 7, ["both"])]
    find = LoraFolder(str(folder)).find
    items = list(parse_rows(rows, {}, RULES, find))
    assert [getattr(item, "status", "valid") for item in items] == ["valid", "invalid", "invalid", "invalid"]
    assert isinstance(items[2], ResultRow)
    assert items[2].error == "lora '7' is not text but int"
    (item,) = parse_rows([{"prompt": "x", "style": "both:2"}], {"lora": "style"}, RULES, find)
    assert isinstance(item, PromptRequest)
    assert item.lora is not None and item.lora.weight == 2


# Weights and images


def test_switching_restores_every_bit(model: Any, sd1_folder: Path, folder: Path) -> None:
    """The weights depend on the LoRA in use only, not on the LoRAs before it."""
    find = LoraFolder(str(folder)).find
    plain = weights_of(model)
    fused: dict[Any, Any] = {}
    loras = [find("both"), find("dora:0.7"), find("text"), None, find("text"), find("both"), None, find("dora:0.7")]
    for lora in loras:
        model.use_lora(lora)
        actual = weights_of(model)
        expected = plain if lora is None else fused.setdefault(lora, actual)
        assert actual.keys() == plain.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in plain)
    assert len(fused) == 3
    for lora, actual in fused.items():
        of_run = weights_of(load_model(sd1_folder, LoraSpec(str(lora.path), lora.weight)))
        assert all(torch.equal(actual[name], of_run[name]) for name in plain)
    model.use_lora(None)


def test_images_equal_those_of_runs_with_one_lora(model: Any, sd1_folder: Path, folder: Path) -> None:
    """In any order of the groups, and with equal prompts, whose embeddings differ with the LoRA."""
    find = LoraFolder(str(folder)).find
    loras = {"plain": None, "both": find("both:0.6"), "text": find("text")}
    rows = [
        row(f"{name}-{seed}", lora, seed=seed, guidance=guidance)
        for name, lora in loras.items()
        for seed, guidance in ((1, 7.5), (2, 1.0))
    ]
    expected: dict[str, RenderedImage] = {}
    for name, lora in loras.items():
        specs = [] if lora is None else [LoraSpec(str(lora.path), lora.weight)]
        plain = [replace(one, lora=None) for one in rows if one.id.startswith(name)]
        expected |= render(load_model(sd1_folder, *specs), plain)
    for order in (rows, rows[::-1], [*rows[4:], *rows[:2], *rows[2:4]]):
        rendered = render(model, order)
        for one in rows:
            assert (rendered[one.id].pixels == expected[one.id].pixels).all(), one.id
    assert max_difference(expected["plain-1"].pixels, expected["text-1"].pixels) > 2
    assert max_difference(expected["plain-1"].pixels, expected["both-1"].pixels) > 2


def test_a_lora_of_a_row_is_added_to_those_of_the_run(sd1_folder: Path, folder: Path) -> None:
    find = LoraFolder(str(folder)).find
    spec = LoraSpec(str(folder / "both.safetensors"), 0.5)
    model, both = load_model(sd1_folder, spec), load_model(sd1_folder, spec, LoraSpec(str(folder / "text.safetensors")))
    model.use_lora(find("text"))
    expected = weights_of(both)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(model).items())


def test_long_prompts_use_the_lora_too(sd1_folder: Path, folder: Path) -> None:
    find = LoraFolder(str(folder)).find

    def load(*specs: LoraSpec) -> Any:
        card = read_card(ModelSettings(name=str(sd1_folder), loras=specs, long_prompts=True))
        return load_latent_diffusion(card, CPU, torch.float32, with_checker=False)

    rows = [row("a", None), row("b", find("text"))]
    rendered = render(load(), rows)
    other = render(load(LoraSpec(str(folder / "text.safetensors"))), [replace(rows[1], lora=None)])
    assert (rendered["b"].pixels == other["b"].pixels).all()


def test_only_the_rows_of_an_unfit_lora_are_invalid(model: Any, folder: Path, tmp_path: Path) -> None:
    find = LoraFolder(str(folder)).find
    changed = tmp_path / "changed.safetensors"
    shutil.copy(folder / "both.safetensors", changed)
    lora = LoraFolder(str(tmp_path)).find("changed")
    save_file(load_file(folder / "text.safetensors"), changed)
    rows = [row("a"), row("b", find("odd")), row("c", find("odd")), row("d", find("both")), row("e", lora), row("f")]
    outcomes = {outcome.request.id: outcome for outcome in StepLevelChain(model, BatchSizes(6, 2), None).render(rows)}
    unfit = outcomes["b"]
    assert isinstance(unfit, UnrenderedRow)
    assert unfit.status == "invalid"
    assert "odd.safetensors does not fit the model; was it made for another family? (" in unfit.error
    assert outcomes["c"] == replace(unfit, request=rows[2])
    stale = outcomes["e"]
    assert isinstance(stale, UnrenderedRow)
    assert (stale.status, stale.error) == ("failed", f"{changed} was changed after the run had started")
    first, last = outcomes["a"], outcomes["f"]
    assert isinstance(first, RenderedImage) and isinstance(last, RenderedImage)
    assert (first.pixels == last.pixels).all()
    assert isinstance(outcomes["d"], RenderedImage)


def test_a_changed_lora_is_read_once_for_all_of_its_rows(
    model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "changed.safetensors"
    shutil.copy(folder / "both.safetensors", changed)
    lora = LoraFolder(str(tmp_path)).find("changed")
    changed.unlink()
    read: list[Path] = []

    def hash_and_count(path: Path) -> str:
        read.append(path)
        return hash_file(path)

    monkeypatch.setattr(lora_fusing, "hash_file", hash_and_count)
    rows = [row("a", lora), row("b", lora), row("c"), row("d", lora)]
    outcomes = {outcome.request.id: outcome for outcome in StepLevelChain(model, BatchSizes(6, 2), None).render(rows)}
    assert {name for name, outcome in outcomes.items() if getattr(outcome, "status", "") == "failed"} == {*"abd"}
    assert read == [changed, changed], "once, and again after another row"


def test_a_lora_without_memory_fails_its_rows(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    lora = LoraFolder(str(folder)).find("both")
    with monkeypatch.context() as patch:
        patch.setattr(lora_fusing, "_fuse", fuse)
        (outcome,) = StepLevelChain(model, BatchSizes(6, 2), None).render([row("a", lora)])
    assert isinstance(outcome, UnrenderedRow)
    assert (outcome.status, outcome.error) == ("failed", f"the device's memory is too small to add {lora}")
    (outcome,) = StepLevelChain(model, BatchSizes(6, 2), None).render([row("a", lora)])
    assert isinstance(outcome, RenderedImage)


def test_weights_that_could_not_be_restored_are_restored_before_the_next_row(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, rows without a LoRA would be rendered with parts of the last one, and reported as `ok`."""
    model.use_lora(None)
    plain, lora = weights_of(model), LoraFolder(str(folder)).find("both")
    restore = lora_fusing.RowLoras._restore
    failures = [None, "after fusing", "before the next row"]

    def fail_twice(loras: Any) -> None:
        if failures and failures.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        restore(loras)

    def fuse(pipeline: Any, _: Any, adapter: Any, *__: Any) -> None:
        next(lora_fusing._list_weights(pipeline, adapter)).zero_()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lora_fusing.RowLoras, "_restore", fail_twice)
    with monkeypatch.context() as patch:
        patch.setattr(lora_fusing, "_fuse", fuse)
        outcomes = list(StepLevelChain(model, BatchSizes(6, 2), None).render([row("a", lora), row("b")]))
    assert [outcome.error for outcome in outcomes if isinstance(outcome, UnrenderedRow)] == [
        f"the device's memory is too small to add {lora}",
        "the device's memory is too small to remove the last LoRA",
    ]
    (outcome,) = StepLevelChain(model, BatchSizes(6, 2), None).render([row("c")])
    assert isinstance(outcome, RenderedImage)
    assert all(torch.equal(weight, plain[name]) for name, weight in weights_of(model).items())


@pytest.mark.promises
def test_pipelines_without_a_family(tmp_path: Path) -> None:
    flux = SAVE_FUNCTIONS["flux"](tmp_path / "flux")
    tensors = as_peft(make_layers(load_pipeline(flux), "transformer", "text_encoder"))
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "style.safetensors")
    lora = LoraFolder(str(tmp_path)).find("style")

    def load(*specs: LoraSpec) -> AnyPipeline:
        card = read_card(ModelSettings(name=str(flux), loras=specs))
        return AnyPipeline.load(card, CPU, torch.float32, with_checker=False)

    def render_all(model: AnyPipeline, *rows: PromptRequest) -> dict[str, Any]:
        outcomes = StepLevelChain(model, BatchSizes(4, 2), None).render(rows)
        return {outcome.request.id: outcome.pixels for outcome in outcomes if isinstance(outcome, RenderedImage)}

    model = load()
    rows = [row("plain", size=(64, 64)), row("styled", lora, size=(64, 64))]
    rows = [replace(one, params=replace(one.params, embedded_guidance=True)) for one in rows]
    first, second = render_all(model, *rows), render_all(model, *rows[::-1])
    fused = render_all(load(LoraSpec(str(lora.path))), *[replace(one, lora=None) for one in rows])
    assert (first["plain"] == second["plain"]).all()
    assert (first["styled"] == second["styled"]).all() and (first["styled"] == fused["styled"]).all()
    assert max_difference(first["plain"], first["styled"]) > 2


def test_fused_projections_follow_the_lora(sd1_folder: Path, folder: Path) -> None:
    """On a GPU, networks compute queries, keys and values with one layer."""
    model = load_model(sd1_folder)
    model.pipeline.unet.fuse_qkv_projections()
    find = LoraFolder(str(folder)).find
    rows = [row("a"), row("b", find("both"))]
    rendered, expected = render(model, rows), render(load_model(sd1_folder), rows)
    for one in rows:
        assert max_difference(rendered[one.id].pixels, expected[one.id].pixels) <= 1
    assert max_difference(rendered["a"].pixels, rendered["b"].pixels) > 2


# Order


def test_planning_and_the_queue_group_by_lora(folder: Path) -> None:
    find = LoraFolder(str(folder)).find
    one, other = find("both"), find("both:0.5")
    rows = [row(f"{index}", (None, one, other)[index % 3], steps=2 + index) for index in range(9)]
    ordered = list(order_requests(rows, lambda size: 4))
    assert [request.lora for request in ordered] == [None] * 3 + [other] * 3 + [one] * 3
    estimator = BatchingEstimator(lambda size: 20)
    for request in ordered:
        estimator.add(request, RowCost(10, request.params.slots))
    estimator.close()
    (cost,) = estimator.costs.values()
    assert (cost.images, cost.ticks) == (9, 30)
    queue = RequestQueue(lambda request: request.group_key)
    queue.submit(rows)
    polled = [queue.poll() for _ in rows]
    assert [request.lora for request in polled if isinstance(request, PromptRequest)] == (
        [None] * 3 + [one] * 3 + [other] * 3
    )


# Runs


@pytest.fixture
def table(tmp_path: Path) -> Path:
    cells = ["", "both", "dora:0.5", "", "both:0.5", "both", "missing", "dora:x"]
    return write_csv(
        tmp_path / "t.csv",
        [["prompt", "lora"], *[[f"a red circle {number}", cell] for number, cell in enumerate(cells)]],
    )


def test_a_run_with_a_column(sd1_folder: Path, folder: Path, table: Path, tmp_path: Path) -> None:
    options = ("--model", sd1_folder, "--lora-folder", folder, "--max-failed", "2", "--safety", "none")
    first = run(table, tmp_path / "out", *options)
    assert first.code == 0, first.stderr
    rows = results(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok"] * 6 + ["invalid"] * 2
    assert [row["lora"] for row in rows[:5]] == ["", "both", "dora:0.5", "", "both:0.5"] or rows[0]["lora"] is None
    assert "there is no missing.safetensors" in rows[6]["error"]
    assert "the weight 'x' is not a finite number" in rows[7]["error"]
    assert run_json(tmp_path / "out")["settings"]["model"]["lora_folder"] == str(folder)
    plain = run(table, tmp_path / "plain", "--model", sd1_folder, "--safety", "none")
    assert (
        "column 'lora' is carried and has no effect; if it names the LoRAs of rows, add --lora-folder" in plain.stderr
    )
    others = results(tmp_path / "plain")
    assert [row["status"] for row in others] == ["ok"] * 8
    equal = [row["sha256"] == other["sha256"] for row, other in zip(rows, others, strict=True)]
    same = [row["fingerprint"] == other["fingerprint"] for row, other in zip(rows, others, strict=True)]
    assert equal == same == [True, False, False, True, False, False, False, False]


@pytest.mark.parametrize("folder_name", ["missing", "t.csv"])
def test_a_missing_folder_is_a_usage_error(sd1_folder: Path, table: Path, tmp_path: Path, folder_name: str) -> None:
    path = tmp_path / folder_name
    result = run(table, tmp_path / "out", "--model", sd1_folder, "--lora-folder", path)
    assert result.code == 2
    assert f"--lora-folder {path}: there is no such folder" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_column_needs_a_folder(table: Path, tmp_path: Path, sd1_folder: Path, folder: Path) -> None:
    result = run(table, tmp_path / "out", "--column", "lora=style")
    assert (result.code, "--column lora=... needs --lora-folder" in result.stderr) == (2, True)
    result = run(table, tmp_path / "out", "--model", sd1_folder, "--lora-folder", folder, "--column", "lora=style")
    assert (result.code, "t.csv has no column 'style' for lora" in result.stderr) == (2, True)


def test_a_model_without_a_loader_is_refused(table: Path, tmp_path: Path, folder: Path) -> None:
    pixart = SAVE_FUNCTIONS["pixart"](tmp_path / "pixart")
    result = run(table, tmp_path / "out", "--model", pixart, "--lora-folder", folder)
    assert (result.code, "diffusers has no LoRA loader: leave --lora-folder out" in result.stderr) == (2, True)


@pytest.mark.promises
def test_a_killed_run_continues_with_equal_bytes(sd1_folder: Path, folder: Path, tmp_path: Path) -> None:
    cells = ["", "both", "dora:0.5"]
    rows = [[f"a red circle {number}", cells[number % 3]] for number in range(48)]
    table = write_csv(tmp_path / "t.csv", [["prompt", "lora"], *rows])
    options = ("--model", str(sd1_folder), "--lora-folder", str(folder), "--safety", "none", "--steps", "6")
    out = tmp_path / "out"
    with start(table, out, *options, program=MODULE, session=True, PACE_HOLD="8") as process:
        assert wait_for(process, lambda: any((out / "manifest").glob("part-*")))
        os.killpg(process.pid, signal.SIGKILL)
    done = len(list((out / "images").rglob("*.png")))
    assert run(table, out, *options).code == 0
    assert run(table, tmp_path / "whole", *options).code == 0
    assert 0 < done < 48
    assert hashes(out) == hashes(tmp_path / "whole")
