"""`batch-infer run`: tables in, images and results out, and continued runs after any interruption."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from batch_infer.cli.config import variables_of_option
from batch_infer.cli.progress import ProgressGroup, make_progress
from batch_infer.cli.run import run as run_command
from batch_infer.errors import ModelError, StoppedError, StorageError
from batch_infer.jobs.run import render_tables as score
from batch_infer.manifest import SCHEMA
from batch_infer.models import DEMO_MODEL
from batch_infer.models.stable_diffusion import StableDiffusion
from batch_infer.sinks.folder import FolderSink
from tests.file_servers import serve_folder
from tests.paced import MODULE
from tests.runs import (
    QUICK,
    assert_whole,
    command,
    hashes,
    images,
    results,
    run,
    run_json,
    settings_of,
    start,
    wait_for,
)
from tests.tables import write_bytes, write_csv, write_parquet

MIXED = [
    [
        "id",
        "prompt",
        "negative_prompt",
        "seed",
        "height",
        "num_inference_steps",
        "guidance_scale",
        "num_images_per_prompt",
    ],
    ["a", "a red circle", "", "1", "", "3", "", "2"],
    ["b", "a small blue square", "dull", "", "", "1", "", ""],
    ["c", "a green star at the top", "", "", "72", "2", "1.0", ""],
    ["d", "a red circle", "", "2", "", "5", "0", ""],
    ["e", "a purple triangle", "", "3", "72", "4", "9.5", ""],
    ["f", "a sky background", "red", "", "", "2", "2", "3"],
]
"""Rows of different sizes, steps and guidance, which share denoiser calls."""


def open_image(out: Path, row: dict[str, Any]) -> Any:
    return Image.open(io.BytesIO((out / row["generated_image"]).read_bytes()))


def pixels(out: Path, row: dict[str, Any]) -> np.ndarray:
    return np.asarray(open_image(out, row))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Return a table of three rows that contain only a prompt."""
    return write_csv(tmp_path / "prompts.csv", [["prompt"], ["a red circle"], ["a blue square"], ["a green star"]])


def model_with_checker(folder: Path, threshold: float) -> Path:
    """Copy the demo model with a checker that flags every image (threshold -2) or none (2).

    Similarities are between -1 and 1.
    """
    shutil.copytree(DEMO_MODEL, folder)
    weights = folder / "safety_checker" / "model.safetensors"
    save_file(
        {name: torch.full_like(tensor, threshold) if name.endswith("embeds_weights") else tensor
         for name, tensor in load_file(weights).items()},
        weights, metadata={"format": "pt"},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def flagging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_checker(tmp_path_factory.mktemp("models") / "flags-all", -2.0)


@pytest.fixture(scope="module")
def passing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_checker(tmp_path_factory.mktemp("models") / "flags-nothing", 2.0)


@pytest.fixture(scope="module")
def mixed_hashes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str | None]:
    """Return the hashes of the images of the mixed table, which one run renders."""
    folder = tmp_path_factory.mktemp("mixed")
    assert run(write_csv(folder / "t.csv", MIXED), folder / "out").code == 0
    assert_whole(folder / "out")
    image_hashes = hashes(folder / "out")
    assert len(set(image_hashes.values())) == len(image_hashes) == 9
    return image_hashes


# Results of a run


def test_every_row_is_accounted_for_in_input_order(tmp_path: Path, out: Path) -> None:
    """The table has valid and invalid rows, and carried columns."""
    table = write_parquet(
        tmp_path / "prompts.parquet",
        status=["mine", None, "x", "y"],
        prompt=["a red circle", None, "a blue square", "a green star"],
        num_inference_steps=pa.array([1, 1, 2000, 3], pa.int16()),
        num_images_per_prompt=[2, 1, 1, 1],
        seed=[None, 5, 6, 7],
        tags=[["a"], [], None, ["b", "c"]],
        when=pa.array([1, 2, 3, None], pa.timestamp("ms")),
    )
    done = run(table, out, "--safety", "none")  # an image after one step could be flagged
    assert done.code == 3
    written = pq.read_table(out / "results.parquet")
    assert written.schema.remove_metadata() == pa.schema(
        [*SCHEMA, ("input_status", pa.string()), ("tags", pa.list_(pa.field("element", pa.string()))),
         ("when", pa.timestamp("ms"))]
    )  # fmt: skip
    rows = written.to_pylist()
    assert [(row["id"], row["image_index"], row["status"]) for row in rows] == [
        ("prompts-00000000", 0, "ok"),
        ("prompts-00000000", 1, "ok"),
        ("prompts-00000001", 0, "invalid"),
        ("prompts-00000002", 0, "invalid"),
        ("prompts-00000003", 0, "ok"),
    ]
    assert [row["source_row"] for row in rows] == [0, 0, 1, 2, 3]
    assert {row["source_file"] for row in rows} == {str(table)}
    assert [row["input_status"] for row in rows] == ["mine", "mine", None, "x", "y"]
    assert [row["tags"] for row in rows] == [["a"], ["a"], [], None, ["b", "c"]]
    assert [row["error"] for row in rows if row["status"] == "invalid"] == [
        "the prompt is empty",
        "num_inference_steps '2000' is not within 1 to 1000",
    ]
    assert rows[1]["seed"] == rows[0]["seed"] + 1 < 2**32
    assert [row["num_inference_steps"] for row in rows] == [1, 1, None, None, 3]
    assert rows[4]["generated_image"] == "images/prompts-00000/prompts-00000003-0.png"
    assert_whole(out)


def test_a_result_has_every_column(table: Path, out: Path) -> None:
    assert run(table, out, "--negative-prompt", "dull", "--guidance-scale", "3", "--limit", "1").code == 0
    (row,) = results(out)
    assert (row["prompt"], row["negative_prompt"], row["error"]) == ("a red circle", "dull", None)
    assert (row["height"], row["width"], row["num_inference_steps"]) == (64, 64, 2)
    assert (row["guidance_scale"], row["guidance_rescale"], row["scheduler"]) == (3.0, 0.0, "DDIMScheduler")
    assert (row["prompt_truncated"], row["slots"], row["attempt"]) == (False, 8, 1)
    assert row["prompt_tokens"] > 0
    assert row["nsfw_content_detected"] in (True, False)
    assert row["safety_checker"]
    assert len(row["safety_scores"]) == 17
    assert row["seconds"] > 0
    assert row["worker"]
    assert row["finished_at"].tzinfo
    image = open_image(out, row)
    assert image.size == (64, 64)
    assert image.text["parameters"].startswith("a red circle\nNegative prompt: dull\nSteps: 2, Sampler: DDIMScheduler,")


def test_run_json_has_settings_versions_and_summary(table: Path, out: Path) -> None:
    run(table, out, "--max-failed", "1%")
    record = run_json(out)
    assert record["tables"] == [str(table)]
    assert record["settings"]["defaults"]["num_inference_steps"] == 2
    assert set(record["model"]) == {"name", "path", "revision", "family", "fingerprint", "loras"}
    assert Path(record["model"]["path"]) == DEMO_MODEL
    assert {"torch", "diffusers", "transformers", "python"} <= set(record["versions"])
    assert (record["compute"]["slots"], record["compute"]["threads"]) == (8, 1)
    assert record["compute"]["decode_batch"] >= 1
    summary = record["summary"]
    assert (summary["rows"], summary["images"], summary["ok"] + summary["flagged"]) == (3, 3, 3)
    assert summary["seconds"] > 0 < summary["images_per_second"]
    assert 0 < summary["occupancy"] <= 1
    assert sum(summary["stage_shares"].values()) == pytest.approx(1, abs=0.01)
    assert summary["peak_memory"]["host_bytes"] > 2**20
    assert record["started_at"] < record["finished_at"]


def test_image_k_is_the_image_of_seed_plus_k(tmp_path: Path) -> None:
    """Any image can therefore be rendered alone."""
    header = ["id", "prompt", "seed", "num_images_per_prompt"]
    run(write_csv(tmp_path / "t.csv", [header, ["a", "a red circle", 5, 3]]), tmp_path / "three")
    run(write_csv(tmp_path / "t.csv", [header, ["b", "a red circle", 7, 1]]), tmp_path / "one")
    assert hashes(tmp_path / "three")["a", 2] == hashes(tmp_path / "one")["b", 0]
    assert len(set(hashes(tmp_path / "three").values())) == 3


@pytest.mark.parametrize(("image_format", "suffix"), [("jpeg", ".jpg"), ("webp", ".webp")])
def test_images_can_be_jpeg_or_webp(table: Path, out: Path, image_format: str, suffix: str) -> None:
    assert run(table, out, "--image-format", image_format, "--limit", "1").code == 0
    (row,) = results(out)
    assert row["generated_image"].endswith(suffix)
    assert open_image(out, row).format == image_format.upper()
    assert_whole(out)
    run(table, out.with_name("png"), "--limit", "1")
    (png,) = results(out.with_name("png"))
    assert png["pixels_sha256"] == row["pixels_sha256"] is not None
    assert png["sha256"] != row["sha256"]


def test_csv_and_jsonl_can_contain_images_in_base64(table: Path, out: Path) -> None:
    assert run(table, out, "--results", "csv", "--results", "jsonl", "--base64").code == 0
    with (out / "results.csv").open(newline="") as stream:
        from_csv = list(csv.DictReader(stream))
    from_json = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for row, text, other in zip(results(out), from_csv, from_json, strict=True):
        assert text["id"] == other["id"] == row["id"]
        assert text["generated_image"] == other["generated_image"]
        content = base64.b64decode(text["generated_image"], validate=True)
        assert content == (out / row["generated_image"]).read_bytes()
        assert Image.open(io.BytesIO(content)).format == "PNG"


@pytest.mark.parametrize("ids", [["../../x", "/etc/passwd", "a/b"], ["A", "a", "nul"], ["x" * 300, "名前 🎨", "a\nb"]])
def test_no_id_escapes_from_out(tmp_path: Path, ids: list[str]) -> None:
    table = write_csv(tmp_path / "in" / "t.csv", [["id", "prompt"], *([name, "a red circle"] for name in ids)])
    assert run(table, tmp_path / "deep" / "out").code == 0
    assert [row["id"] for row in results(tmp_path / "deep" / "out")] == ids
    assert_whole(tmp_path / "deep" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}


def test_an_unreadable_file_is_one_invalid_result(tmp_path: Path, table: Path, out: Path) -> None:
    folder = tmp_path / "tables"
    write_bytes(folder / "a.csv", table.read_bytes())
    write_bytes(folder / "b.parquet", b"PAR1 and no more")
    done = run(folder, out)
    assert done.code == 3
    assert [row["status"] for row in results(out)].count("invalid") == 1
    assert "b.parquet cannot be read" in results(out)[-1]["error"]
    assert "b.parquet cannot be read" in done.stderr


# Exit codes and messages


@pytest.mark.parametrize(
    ("budget", "code"), [("0", 3), ("1", 3), ("2", 0), ("10%", 3), ("50%", 0)], ids=lambda value: str(value)
)
def test_max_failed_decides_the_exit_code(tmp_path: Path, out: Path, budget: str, code: int) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt", "seed"], ["", "5"], ["a red circle", "x"], ["a", ""], ["b", ""]])
    assert run(table, out, "--max-failed", budget).code == code
    assert run(table, out, "--max-failed", budget).code == code, "a run without pending rows has the same exit code"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--steps", "0"], "num_inference_steps '0' is not within 1 to 1000"),
        (["--height", "13"], "height '13' is not within"),
        (["--guidance-scale", "nan"], "guidance_scale 'nan' is not a number"),
        (["--seed", "-1"], "seed '-1' is not within"),
        (["--column", "prompt=caption"], "has no column 'caption'"),
        (["--column", "colour=x"], "--column colour=x"),
        (["--max-failed", "few"], "--max-failed few"),
        (["--scheduler", "No:Scheduler"], "is not key=value"),
        (["--scheduler", "NoScheduler"], "diffusers has no scheduler NoScheduler"),
        (["--scheduler", "EulerDiscretScheduler"], "did you mean EulerDiscreteScheduler"),
        (["--scheduler", "ddim:steps_ofset=1"], "DDIMScheduler has no option steps_ofset; did you mean steps_offset?"),
        (["--model", "./missing"], "missing"),
        (["--safety", "none", "--require-safety"], "contradict each other"),
        (["--device", "cuda"], "finds no CUDA device"),
        (["--steps", "ten"], "'ten' is not a valid integer"),
        (["--nonsense"], "run has no option --nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_render_nothing(table: Path, out: Path, options: list[str], sentence: str) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run(table, out, *options)
    assert (done.code, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    if "--scheduler" in options:
        assert "to render" not in done.stderr, "the tables are not scanned first"
    assert not images(out)
    assert not (out / "results.parquet").exists()


def test_a_missing_table_is_a_usage_error(tmp_path: Path, out: Path) -> None:
    done = run(tmp_path / "missing.csv", out)
    assert (done.code, out.exists()) == (2, False)
    assert done.stderr == f"batch-infer: {tmp_path}/missing.csv: no such file or folder\n"


def test_a_missing_table_is_never_an_invalid_row(table: Path, out: Path) -> None:
    """`--max-failed 5 percent` names a table `percent`."""
    assert run(table, out, "--limit", "1").code == 0
    before = (out / "run.json").read_bytes()
    others = {"plan": (), "retry": ("--status", "failed"), "rescore": ("--safety", "checker")}
    done = [run(table, out, "--max-failed", "5", "percent", "shards/*.csv")]
    done.append(command("plan", table, "percent", "shards/*.csv", "--out", out))
    done += [command(name, out, table, "percent", "shards/*.csv", *others[name]) for name in ("retry", "rescore")]
    for each in done:
        assert (each.code, each.stdout) == (2, "")
        assert "percent: no such file or folder · shards/*.csv: the glob matches no table" in each.stderr
    assert (out / "run.json").read_bytes() == before


def test_a_file_in_place_of_out_is_refused(tmp_path: Path, table: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = run(table, tmp_path / "file")
    assert done.code == 2
    assert "cannot write to" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_the_summary_goes_to_stdout(table: Path, out: Path) -> None:
    first = run(table, out, "--results", "csv").stdout
    assert re.match(
        r"3 rows · \d ok · \d flagged\n(flagged .*\n.*\n)?speed    .* \(3 images in .*, .* in all\)\n",
        first,
    )
    assert f"{out}/results.parquet, {out}/results.csv" in first
    assert "nothing to render" in run(table, out).stdout


def test_json_prints_the_summary_of_run_json(table: Path, out: Path) -> None:
    done = run(table, out, "--json")
    assert json.loads(done.stdout) == run_json(out)["summary"]


def test_quiet_prints_nothing_only_on_success(table: Path, out: Path) -> None:
    done = run(table, out, "-q")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    write_csv(table, [["prompt"], [""]])
    done = run(table, out, "-q")
    assert done.code == 3
    assert "1 invalid" in done.stdout


def test_invalid_rows_are_logged_to_stderr_and_to_the_file(tmp_path: Path, out: Path) -> None:
    """Only the first twenty are logged as warnings. run.log contains all."""
    table = write_csv(tmp_path / "t.csv", [["prompt", "seed"], *(["x", "ten"] for _ in range(30))])
    done = run(table, out)
    assert done.stderr.count("seed 'ten' is not a whole number") == 20
    assert "t.csv, line 21 (t-00000019): seed 'ten'" in done.stderr
    assert "30 rows are invalid; results.parquet contains each" in done.stderr
    assert "t.csv, line 31 (t-00000029): seed 'ten'" in (out / "logs" / "run.log").read_text()
    assert not images(out)


def test_columns_in_the_path_are_rendered_and_carried(tmp_path: Path, out: Path) -> None:
    for path in ("lang=en/height=72", "lang=__HIVE_DEFAULT_PARTITION__/height=64"):
        write_parquet(tmp_path / "ds" / path / "part-0.parquet", prompt=["a red circle"])
    planned = json.loads(command("plan", tmp_path / "ds", "--out", out, *QUICK, "--json").stdout)
    assert sorted(size["height"] for size in planned["sizes"]) == [64, 72]
    assert run(tmp_path / "ds", out).code == 0
    assert [(row["height"], row["lang"]) for row in results(out)] == [(64, None), (72, "en")]
    assert command("retry", out, "--status", "failed").code == 0


def test_plan_and_run_log_remarks_on_the_tables(tmp_path: Path, out: Path) -> None:
    table = write_bytes(tmp_path / "t.csv", b"prompt,seed\nx,2,\ny\n,\n")
    planned = command("plan", table, "--out", out, *QUICK, "--json")
    done = run(table, out)
    assert (planned.code, done.code) == (0, 0)
    short, blank = json.loads(planned.stdout)["remarks"]
    assert short.endswith("t.csv, line 3: 1 of 2 cells, without 'seed')")
    assert blank.endswith("t.csv, line 4)")
    for text in (planned.stderr, done.stderr, (out / "logs" / "run.log").read_text()):
        assert text.count(short) == text.count(blank) == 1
    assert len(results(out)) == json.loads(planned.stdout)["rows"] == 2


def test_the_environment_sets_options(table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option takes precedence over its variable."""
    monkeypatch.setenv("BATCH_INFER_STEPS", "3")
    monkeypatch.setenv("BATCH_INFER_GUIDANCE_SCALE", "4")
    monkeypatch.setenv("BATCH_INFER_RESULTS", "csv jsonl")
    monkeypatch.setenv("BATCH_INFER_LIMIT", "1")
    run(table, out)
    (row,) = results(out)
    assert (row["num_inference_steps"], row["guidance_scale"]) == (2, 4.0)
    assert (out / "results.csv").exists() and (out / "results.jsonl").exists()
    monkeypatch.setenv("BATCH_INFER_LIMIT", "none")
    assert run(table, out).code == 2


# Running again


def parts(out: Path) -> set[str]:
    return {path.name for path in (out / "manifest").glob("part-*")}


def test_every_option_is_an_environment_variable() -> None:
    for option in (parameter for parameter in run_command.params if isinstance(parameter, click.Option)):
        names = [name.lstrip("-").upper().replace("-", "_") for name in option.opts if name.startswith("--")]
        assert variables_of_option(option) == [f"BATCH_INFER_{name}" for name in names]


def test_columns_from_the_environment_may_contain_spaces(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_csv(tmp_path / "t.csv", [["my caption", "n"], ["a red circle", "5"]])
    monkeypatch.setenv("BATCH_INFER_COLUMN", "prompt=my caption;seed=n")
    assert run(table, out).code == 0
    assert [(row["prompt"], row["seed"]) for row in results(out)] == [("a red circle", 5)]


# Files of the user and of other programs


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "--overwrite"])
@pytest.mark.parametrize("name", ["results.csv", "images/t.csv"])
def test_a_table_where_the_run_would_write_is_refused(tmp_path: Path, name: str, options: list[str]) -> None:
    table = write_csv(tmp_path / name, [["prompt"], ["a red circle"]])
    done = run(table, tmp_path, *options)
    assert (done.code, "give another --out" in done.stderr) == (2, True)
    assert table.read_text() == "prompt\na red circle\n"


def test_results_of_another_program_are_not_overwritten(table: Path, out: Path) -> None:
    write_bytes(out / "results.parquet", b"mine")
    assert run(table, out).code == 2
    assert (out / "results.parquet").read_bytes() == b"mine"


def test_paths_may_contain_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow reads a relative path with a colon as a URI."""
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "t-12:30.parquet", prompt=["a red circle"])
    assert run("t-12:30.parquet", Path("out-12:30")).code == 0
    assert_whole(tmp_path / "out-12:30")
    assert command("run", "t-12:30.parquet", "--out", "s3://bucket/out").code == 2


def test_a_refused_scheduler_does_not_block_the_next_run(table: Path, out: Path) -> None:
    refused = run(table, out, "--scheduler", "DDIMScheduler:clip_sample=true")
    assert (refused.code, "its steps are not linear" in refused.stderr) == (2, True)
    assert run(table, out).code == 0


def test_a_model_is_the_same_by_any_path(
    tmp_path: Path, table: Path, out: Path, passing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(passing.parent)
    run(table, out, "--model", f"./{passing.name}", "--limit", "1")
    assert run(table, out, "--model", passing).code == 0
    run(table, tmp_path / "other", "--model", passing)
    assert hashes(out) == hashes(tmp_path / "other")
    assert str(passing.parent).encode() not in (out / results(out)[0]["generated_image"]).read_bytes()


def test_a_row_of_many_images_fails_once(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])
    monkeypatch.setattr(
        StableDiffusion, "decode", lambda self, latents: torch.full((len(latents), 3, 64, 64), torch.nan)
    )
    assert run(table, out, "--images-per-prompt", "3", "--max-failed", "1").code == 0


def test_finished_rows_are_skipped(table: Path, out: Path) -> None:
    run(table, out)
    before = parts(out), {path: (out / path).stat().st_mtime_ns for path in images(out)}
    done = run(table, out, "--json")
    assert (done.code, json.loads(done.stdout)["rendered"]) == (0, 0)
    assert before == (parts(out), {path: (out / path).stat().st_mtime_ns for path in images(out)})


def test_only_appended_rows_are_rendered(table: Path, out: Path) -> None:
    run(table, out)
    before = hashes(out)
    with table.open("a") as stream:
        stream.write("a purple triangle\n")
    assert json.loads(run(table, out, "--json").stdout)["rendered"] == 1
    assert len(hashes(out)) == 4
    assert before.items() <= hashes(out).items()
    assert_whole(out)


def test_a_changed_row_is_rendered_again_and_its_old_file_removed(table: Path, out: Path) -> None:
    run(table, out)
    before = hashes(out)
    write_csv(table, [["prompt"], ["a red circle"], ["an orange square"], ["a green star"]])
    assert json.loads(run(table, out, "--json", "--image-format", "webp").stdout)["rendered"] == 1
    first, changed, last = results(out)
    assert [row["attempt"] for row in (first, changed, last)] == [1, 2, 1]
    assert changed["prompt"] == "an orange square"
    assert changed["generated_image"].endswith("prompts-00000001-0.webp")
    assert {key for key, value in hashes(out).items() if before[key] != value} == {("prompts-00000001", 0)}
    assert_whole(out)


def test_partial_files_of_a_killed_run_are_removed(table: Path, out: Path) -> None:
    """Folders of other programs are left alone."""
    run(table, out)
    (out / "run.json").write_text(json.dumps({**run_json(out), "summary": None}))
    ours, others = (
        out / "images" / "prompts-00000" / ".tmp-0a1b2c3d-1-0123456789ab-a-0.png",
        out / "mine" / ".tmp-0a1b2c3d-1-0123456789ab-a.png",
    )
    for path in (ours, others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert run(table, out).code == 0
    assert (ours.exists(), others.exists()) == (False, True)


def test_changed_carried_columns_render_nothing(table: Path, out: Path) -> None:
    run(table, out)
    rows = [["note", "prompt"], ["1", "a red circle"], ["2", "a blue square"], ["3", "a green star"]]
    done = run(write_csv(table, rows), out, "--json")
    assert json.loads(done.stdout)["rendered"] == 0
    assert [row["note"] for row in results(out)] == ["1", "2", "3"]


def test_rows_removed_from_the_table_stay_only_in_the_manifest(table: Path, out: Path) -> None:
    run(table, out)
    before, rows = hashes(out), table.read_text()
    write_csv(table, [["prompt"], ["a red circle"]])
    assert json.loads(run(table, out, "--json").stdout)["rows"] == 1
    assert list(hashes(out)) == [("prompts-00000000", 0)]
    assert len(images(out)) == 3
    table.write_text(rows)
    assert json.loads(run(table, out, "--json").stdout)["rendered"] == 0, "rows that return are not rendered again"
    assert hashes(out) == before


def test_the_image_of_a_row_that_becomes_invalid_is_removed(table: Path, out: Path) -> None:
    run(table, out)
    write_csv(table, [["prompt", "seed"], ["a red circle"], ["a blue square", "x"], ["a green star"]])
    assert run(table, out).code == 3
    assert [row["status"] == "invalid" for row in results(out)] == [False, True, False]
    assert_whole(out)
    write_csv(table, [["prompt"], ["a red circle"], ["a blue square"], ["a green star"]])
    assert run(table, out).code == 0
    assert_whole(out)


def test_images_of_a_row_that_was_invalid_for_one_run_are_kept(tmp_path: Path, out: Path) -> None:
    header = ["id", "prompt", "num_images_per_prompt"]
    table = write_csv(tmp_path / "t.csv", [header, ["a", "a red circle", 3]])
    assert run(table, out).code == 0
    before = hashes(out)
    write_csv(table, [header, ["a", "", 3]])
    assert run(table, out).code == 3
    write_csv(table, [header, ["a", "a red circle", 3]])
    assert run(table, out).code == 0
    assert hashes(out) == before
    assert_whole(out)


@pytest.mark.parametrize("change", ["gone", "appended"])
def test_a_table_that_changes_during_a_run_loses_no_result(tmp_path: Path, out: Path, change: str) -> None:
    rows = [["prompt"], *([f"a red circle, {i}"] for i in range(6))]
    table = write_csv(tmp_path / "t.csv", rows)

    class Changing(ProgressGroup):
        def committed(self, rows: Any) -> None:
            table.unlink(missing_ok=True)  # a slow machine commits more than once
            if change == "appended":
                write_csv(table, [["prompt"], *(["a blue square"] for _ in range(20))])

    summary = score(settings_of(table, out), Changing())
    assert (summary.counts.rows, summary.counts.remaining) == (6, 0)
    assert len(results(out)) == 6
    assert_whole(out)


def test_a_secret_in_a_url_is_not_stored(tmp_path: Path, out: Path) -> None:
    """To continue, the user names the tables again."""
    with serve_folder(write_csv(tmp_path / "served" / "t.csv", [["prompt"], ["a red circle"]]).parent) as address:
        url = f"simplecache::{address.replace('://', '://SECRET@')}/t.csv?signature=SECRET"
        done = run(url, out)
        assert done.code == 0
        assert "SECRET" not in done.stdout + done.stderr
        assert not [path for path in out.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]
        done = command("retry", out, "--status", "missing")
        assert done.code == 2
        assert "name the TABLEs after OUT" in done.stderr
        assert command("merge", out).code == 0
        assert command("retry", out, url, "--status", "missing").code == 0


def test_slots_and_threads_are_kept(table: Path, out: Path) -> None:
    """Image bytes depend on them, so a continued run keeps them."""
    run(table, out, "--slots", "6", "--limit", "1")
    score(settings_of(table, out), ProgressGroup())
    assert (run_json(out)["compute"]["slots"], run_json(out)["compute"]["threads"]) == (6, 1)
    assert [row["slots"] for row in results(out)] == [6, 6, 6]


@pytest.mark.parametrize(
    ("options", "what", "value"),
    [
        (["--scheduler", "EulerDiscreteScheduler"], "scheduler DDIMScheduler", "scheduler EulerDiscreteScheduler"),
        (["--safety", "none"], "safety ", "safety none"),
        (["--on-flagged", "drop"], "safety .*, on flagged keep", "safety .*, on flagged drop"),
        (["--dtype", "bfloat16"], "dtype float32", "dtype bfloat16"),
        (["--model", "MODEL"], "model built-in demo model", "model "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_run_on_the_same_out_is_refused(
    table: Path, out: Path, sd1_folder: Path, options: list[str], what: str, value: str
) -> None:
    run(table, out, "--limit", "1")
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file() and path.suffix != ".log"}
    done = run(table, out, *(str(sd1_folder) if option == "MODEL" else option for option in options))
    assert done.code == 2
    assert re.search(
        rf"{re.escape(str(out))} was made with {what}.*, and this run has {value}.*--overwrite", done.stderr
    )
    assert before == {path: path.read_bytes() for path in before}


def test_capitals_of_ids_stay_in_file_names(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of an earlier version, which did not use capitals, keep their names."""
    ids = ["SKU-1", "sku-1", "B", "c"]
    table = write_csv(tmp_path / "T.csv", [["id", "prompt"], *([name, "a red circle"] for name in ids)])
    with monkeypatch.context() as patch:
        patch.setattr("batch_infer.store.local_images.is_case_sensitive", lambda folder: False)
        assert run(table, out).code == 0
    earlier = images(out)
    assert all(re.fullmatch(r"images/T~[0-9a-f]{16}-00000/(SKU-1|sku-1|B)~[0-9a-f]{16}-0\.png|.*/c-0\.png", path)
               for path in earlier)  # fmt: skip
    assert json.loads(run(table, out, "--json").stdout)["rendered"] == 0
    assert command("rescore", out, "--safety", "checker", "--on-flagged", "keep").code == 0
    assert images(out) == earlier
    assert_whole(out)
    done = run(table, out, "--safety", "checker", "--steps", "3", "--rerender-changed", "--json")
    assert json.loads(done.stdout)["rendered"] == 4
    assert images(out) == earlier
    assert_whole(out)
    assert run(table, out, "--overwrite").code == 0
    (digest,) = {path for path in images(out) if "~" in path}
    assert re.fullmatch(r"images/T-00000/sku-1~[0-9a-f]{16}-0\.png", digest)
    assert images(out) - {digest} == {f"images/T-00000/{name}-0.png" for name in ("SKU-1", "B", "c")}
    assert_whole(out)


def test_two_urls_with_one_name_are_two_tables(tmp_path: Path, out: Path) -> None:
    for name in "ab":
        write_csv(tmp_path / name / "t.csv", [["id", "prompt"], [f"{name}1", "a red circle"], [f"{name}2", "x"]])
    with serve_folder(tmp_path) as server:
        urls = [f"simplecache::{server}/t.csv?in={name}" for name in "ab"]
        assert run(urls[0], out, urls[1]).code == 0
        assert json.loads(run(urls[0], out, urls[1], "--json").stdout)["rendered"] == 0
    assert command("merge", out).code == 0
    assert [(row["id"], row["source_file"], row["source_row"], row["generated_image"]) for row in results(out)] == [
        (f"{name}{row + 1}", f"simplecache::{server}/t.csv{mark}", row, f"images/t-00000/{name}{row + 1}-0.png")
        for name, mark in (("a", ""), ("b", "#2"))
        for row in (0, 1)
    ]
    assert "?in" not in (out / "run.json").read_text()
    assert_whole(out)


def test_image_paths_never_differ_only_by_case(tmp_path: Path, out: Path) -> None:
    tables = tmp_path / "tables"
    write_csv(tables / "x/a.csv", [["prompt"], ["a red circle"]])
    write_csv(tables / "y/b.csv", [["id", "prompt"], ["sku", "a red circle"]])
    assert run(tables, out).code == 0
    before = images(out)
    assert before == {"images/a-00000/x-a-00000000-0.png", "images/b-00000/sku-0.png"}
    write_csv(tables / "X/a.csv", [["prompt"], ["a red circle"]])
    write_csv(tables / "X/A.csv", [["prompt"], ["a red circle"]])
    write_csv(tables / "B.csv", [["id", "prompt"], ["SKU", "a red circle"], ["c", "a red circle"]])
    assert json.loads(run(tables, out, "--json").stdout)["rendered"] == 4
    after = images(out)
    assert before < after
    assert len({part.lower() for path in after for part in (path, path.rpartition("/")[0])}) == len(
        {part for path in after for part in (path, path.rpartition("/")[0])}
    )
    assert_whole(out)
    assert json.loads(run(tables, out, "--json").stdout)["rendered"] == 0
    assert command("rescore", out, "--safety", "checker", "--on-flagged", "keep").code == 0
    done = run(tables, out, "--safety", "checker", "--steps", "3", "--rerender-changed", "--json")
    assert json.loads(done.stdout)["rendered"] == 6
    assert images(out) == after
    assert_whole(out)


@pytest.mark.parametrize("processes", ["0", pytest.param("2", marks=pytest.mark.promises)])
def test_overwrite_starts_from_scratch(table: Path, out: Path, processes: str) -> None:
    run(table, out, "--results", "csv", "--image-format", "jpeg")
    (out / "notes.txt").write_text("mine")
    options = ("--scheduler", "EulerDiscreteScheduler", "--num-processes", processes)
    done = run(table, out, *options, "--overwrite", "--limit", "2", "--json")
    assert (done.code, json.loads(done.stdout)["rendered"]) == (0, 2)
    assert {row["scheduler"] for row in results(out)} == {"EulerDiscreteScheduler"}
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "results.csv").exists()
    assert_whole(out)


@pytest.mark.parametrize(
    "options", [["--steps", "0"], ["--column", "prompt=x"], ["--model", "./missing"]], ids=" ".join
)
def test_overwrite_removes_nothing_if_the_run_is_refused(table: Path, out: Path, options: list[str]) -> None:
    run(table, out, "--limit", "1")
    before = hashes(out)
    assert run(table, out, "--overwrite", *options).code == 2
    assert hashes(out) == before
    assert_whole(out)


@pytest.mark.parametrize("left", [None, "logs"])
def test_overwrite_of_nothing_is_a_first_run(left: str | None, table: Path, out: Path) -> None:
    """A run whose model fails to load leaves logs/ behind."""
    if left:
        (out / left).mkdir(parents=True)
    assert run(table, out, "--overwrite").code == 0
    assert_whole(out)


def test_overwrite_removes_nothing_if_the_model_does_not_load(
    table: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(table, out, "--image-format", "jpeg")
    files = {path: path.read_bytes() for path in out.rglob("[!.]*") if path.is_file() and path.suffix != ".log"}

    def load(*_: Any) -> None:
        raise ModelError("the weights do not fit")

    with monkeypatch.context() as patch:
        patch.setattr("batch_infer.engines.inline.load_chain", load)
        done = run(table, out, "--overwrite", "--scheduler", "EulerDiscreteScheduler")
    assert (done.code, "the weights do not fit" in done.stderr) == (2, True)
    assert {path: path.read_bytes() for path in files} == files
    assert images(out) == {path.relative_to(out).as_posix() for path in files if path.suffix == ".jpg"}
    assert json.loads(run(table, out, "--image-format", "jpeg", "--json").stdout)["rendered"] == 0


def test_overwrite_removes_nothing_if_the_run_stops_before_the_model_is_loaded(table: Path, out: Path) -> None:
    run(table, out)
    before = hashes(out)
    with pytest.raises(StoppedError, match="stopped before --overwrite removed old files from"):
        score(replace(settings_of(table, out), overwrite=True), make_progress(shown=False), lambda: True)
    assert hashes(out) == before
    assert_whole(out)


def test_an_overwrite_killed_after_clearing_out_is_continued(
    table: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test includes images/ as a link to a disk with other files."""
    run(table, out)
    (out / "images").rename(tmp_path / "disk")
    (out / "images").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "mine").touch()

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("batch_infer.jobs.run_folder.remove_leftovers", end)
        score(replace(settings_of(table, out), overwrite=True), make_progress(shown=False))
    assert run(table, out).code == 0
    assert (tmp_path / "disk" / "mine").exists()


@pytest.mark.parametrize("valid", [True, False])
def test_overwrite_accounts_for_invalid_rows(tmp_path: Path, out: Path, valid: bool) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt"], [""], *([["a red circle"]] * 2)])
    assert run(table, out).code == 3
    table = write_csv(tmp_path / "t.csv", [["prompt", "seed"], ["x", "-1"], *([["a blue circle", "3"]] * valid)])
    done = run(table, out, "--overwrite", "--json")
    assert done.code == 3, done.stderr
    assert done.stderr.count("seed '-1' is not within") == 1
    assert [row["status"] for row in results(out)] == ["invalid", *(["ok"] * valid)]
    assert (json.loads(done.stdout)["invalid"], json.loads(done.stdout)["left"]) == (1, 0)
    assert_whole(out)


def test_out_may_be_inside_the_folder_of_tables(table: Path) -> None:
    out = table.parent / "out"
    for _ in range(2):
        done = run(table.parent, out, "--results", "csv", "--json")
        assert (done.code, json.loads(done.stdout)["rows"]) == (0, 3)


# Invariant 1: an image depends only on its row, the model and the settings of the run


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_rows_give_the_same_images(
    tmp_path: Path, mixed_hashes: dict[tuple[str, int], str | None], seed: int
) -> None:
    header, *rows = MIXED
    random.Random(seed).shuffle(rows)
    assert run(write_csv(tmp_path / "t.csv", [header, *rows]), tmp_path / "out").code == 0
    assert hashes(tmp_path / "out") == mixed_hashes


def test_a_table_in_pieces_gives_the_same_images(
    tmp_path: Path, mixed_hashes: dict[tuple[str, int], str | None]
) -> None:
    header, *rows = MIXED
    for name, piece in (("z", rows[:1]), ("y", rows[1:4]), ("x", rows[4:])):
        write_csv(tmp_path / "tables" / f"{name}.csv", [header, *piece])
    assert run(tmp_path / "tables", tmp_path / "out").code == 0
    assert hashes(tmp_path / "out") == mixed_hashes


@pytest.mark.promises
def test_rows_one_by_one_give_the_same_images(tmp_path: Path, mixed_hashes: dict[tuple[str, int], str | None]) -> None:
    """Rows are appended one by one, each rendered by its own run with otherwise empty slots."""
    for count in range(2, len(MIXED) + 1):
        assert run(write_csv(tmp_path / "t.csv", MIXED[:count]), tmp_path / "out").code == 0
    assert hashes(tmp_path / "out") == mixed_hashes


# Safety


@pytest.mark.parametrize("policy", ["blank", "keep", "blur", "quarantine", "drop"])
def test_on_flagged_decides_how_a_flagged_image_is_stored(
    tmp_path: Path, table: Path, flagging: Path, policy: str
) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert run(table, plain, "--model", flagging, "--safety", "none").code == 0
    done = run(table, out, "--model", flagging, "--on-flagged", policy)
    assert done.code == 0, "flagged rows do not count as failures"
    assert "3 rows · 0 ok · 3 flagged" in done.stdout
    for row, unjudged in zip(results(out), results(plain), strict=True):
        assert (row["status"], row["nsfw_content_detected"]) == ("flagged", True)
        assert re.match(r"the safety check flagged the image \(concept_\d+ \+\d", row["error"])
        assert max(row["safety_scores"].values()) > 0
        match policy:
            case "drop":
                assert (row["generated_image"], row["sha256"], row["image_bytes"]) == (None, None, None)
            case "blank":
                assert pixels(out, row).max() == 0
            case "blur":
                assert not np.array_equal(pixels(out, row), pixels(plain, unjudged))
                assert pixels(out, row).mean() == pytest.approx(pixels(plain, unjudged).mean(), abs=8)
            case "keep" | "quarantine":
                assert row["sha256"] == unjudged["sha256"]
                assert row["generated_image"].split("/")[0] == {"keep": "images", "quarantine": "quarantine"}[policy]
    assert_whole(out)
    assert json.loads(run(table, out, "--model", flagging, "--on-flagged", policy, "--json").stdout)["rendered"] == 0


def test_images_that_the_checker_accepts_are_ok(table: Path, out: Path, passing: Path) -> None:
    assert run(table, out, "--model", passing, "--require-safety", "--safety", "checker").code == 0
    for row in results(out):
        assert (row["status"], row["nsfw_content_detected"], row["error"]) == ("ok", False, None)
        assert max(row["safety_scores"].values()) < 0


def test_nsfw_is_null_without_a_checker(table: Path, out: Path, flagging: Path) -> None:
    done = run(table, out, "--model", flagging, "--safety", "none")
    assert (done.code, "checker" in done.stderr) == (0, False)
    for row in results(out):
        assert (row["status"], row["nsfw_content_detected"]) == ("ok", None)
        assert (row["safety_checker"], row["safety_scores"]) == (None, None)


def test_a_model_without_a_checker_is_warned_about(table: Path, out: Path, sd2_folder: Path) -> None:
    done = run(table, out, "--model", sd2_folder, "--limit", "1")
    assert done.code == 0
    assert (
        done.stderr.count("has no safety checker: images will not be checked; nsfw_content_detected will be null") == 1
    )
    assert [row["nsfw_content_detected"] for row in results(out)] == [None]


@pytest.mark.parametrize("options", [["--require-safety"], ["--safety", "checker"]], ids=" ".join)
def test_a_model_without_a_checker_can_be_refused(table: Path, out: Path, sd2_folder: Path, options: list[str]) -> None:
    done = run(table, out, "--model", sd2_folder, *options)
    assert (done.code, out.exists()) == (2, False)
    assert "has no safety checker" in done.stderr


# Failing rows and full disks


def test_a_row_that_fails_is_tried_three_times(table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rendered again once it changes."""
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "decode", lambda self, latents: torch.full((len(latents), 3, 64, 64), torch.nan))
        for attempt in (1, 2, 3, 3):
            assert run(table, out).code == 3
            assert [(row["status"], row["attempt"]) for row in results(out)] == [("failed", attempt)] * 3
        assert "not finite" in results(out)[0]["error"]
        assert results(out)[0]["generated_image"] is None
        assert len(parts(out)) == 3
    assert run(table, out, "--negative-prompt", "dull").code == 0
    assert_whole(out)


def test_a_failed_row_can_succeed_later(table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "decode", lambda self, latents: torch.full((len(latents), 3, 64, 64), torch.nan))
        assert run(table, out).code == 3
    assert run(table, out).code == 0
    assert {row["attempt"] for row in results(out)} == {2}
    assert_whole(out)


def test_a_full_disk_ends_the_run_and_keeps_committed_rows(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt"], *([f"prompt {i}"] for i in range(12))])
    assert run(table, out, "--limit", "4").code == 0
    before, write = hashes(out), FolderSink.write
    written: list[str] = []

    def fill(self: FolderSink, path: str, content: bytes) -> Any:
        written.append(path)
        if len(written) > 3:
            raise StorageError(f"cannot write {path}: No space left on device")
        return write(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSink, "write", fill)
        done = run(table, out)
        assert done.code == 75
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
    assert run(table, out).code == 0
    assert before.items() <= hashes(out).items()
    assert len(hashes(out)) == 12
    assert_whole(out)


def test_an_uncommitted_change_leaves_the_committed_image(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the row is changed back it counts as finished, so its image must be the committed one."""
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])
    run(table, out)
    before = hashes(out)
    write_csv(table, [["prompt"], ["a blue square"]])
    with monkeypatch.context() as patch:
        patch.setattr(FolderSink, "publish", mock.Mock(side_effect=StorageError("the power went out")))
        assert run(table, out).code == 75
    write_csv(table, [["prompt"], ["a red circle"]])
    assert json.loads(run(table, out, "--json").stdout)["rendered"] == 0
    assert hashes(out) == before


def test_a_run_stopped_before_rendering_reports_its_scan(tmp_path: Path, out: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"], [""]])
    summary = score(settings_of(table, out), ProgressGroup(), lambda: True)
    assert (summary.counts.remaining, summary.counts.invalid) == (1, 1)
    assert [row["status"] for row in results(out)] == ["invalid"]


# Signals to separate processes


@pytest.fixture
def long_table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "long.csv", [["prompt"], *([f"a red circle, {i}"] for i in range(24))])


STEPS = ("--steps", "10")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, int], str | None]]:
    """Return the hashes of the images of the long table, which an undisturbed run renders."""
    folder = tmp_path_factory.mktemp("undisturbed")
    table = write_csv(folder / "long.csv", [["prompt"], *([f"a red circle, {i}"] for i in range(24))])
    assert run(table, folder / "out", *STEPS).code == 0
    yield hashes(folder / "out")


@pytest.mark.promises
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_cleanly(
    long_table: Path, out: Path, undisturbed: dict[tuple[str, int], str | None], number: signal.Signals
) -> None:
    """A second run exits with 75. The first keeps and reports finished rows, and can be continued."""
    with start(long_table, out, *STEPS, program=MODULE, PACE_HOLD="5") as process:
        assert wait_for(process, lambda: bool(images(out)))
        second = run(long_table, out, *STEPS)
        assert second.code == 75
        assert "is locked by another command (" in second.stderr
        assert f"process {process.pid}," in second.stderr
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 75, stderr
    assert "batch-infer: stopping" in stderr
    assert "Traceback" not in stderr
    committed = hashes(out)
    assert 0 < len(committed) < 24
    assert f"stopped early: {24 - len(committed)} left; run the same command again to continue" in stdout
    assert run_json(out)["summary"]["left"] == 24 - len(committed)
    assert_whole(out)
    done = run(long_table, out, *STEPS, "--json")
    assert (done.code, json.loads(done.stdout)["rendered"]) == (0, 24 - len(committed))
    assert hashes(out) == undisturbed
    assert_whole(out)


EARLY = """
import os, signal, sys
class Early:
    def find_spec(self, name, path=None, target=None):
        if name == "pyarrow":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Early())
from batch_infer.__main__ import main
main()
"""
"""Run the command, and send it a signal while its libraries load."""


@pytest.mark.promises
def test_a_signal_during_startup_stops_a_run_cleanly(table: Path, out: Path) -> None:
    with start(table, out, program=("-c", EARLY)) as process:
        stdout, stderr = process.communicate(timeout=600)
    assert (process.returncode, stdout) == (75, "")
    assert "stopped by SIGTERM; what was committed is kept" in stderr
    assert not images(out)


def kill_and_continue(table: Path, out: Path, random_: random.Random, times: int) -> int:
    """Kill a run several times after a few images, then let it finish. Return how many kills hit a running process."""
    killed = 0
    for _ in range(times):
        enough = len(images(out)) + random_.randint(0, 6)

        def has_enough(enough: int = enough) -> bool:
            return len(images(out)) >= enough

        with start(table, out, *STEPS, program=MODULE, PACE_SECONDS="0.1") as process:
            wait_for(process, has_enough)
            time.sleep(random_.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert run(table, out, *STEPS).code == 0
    return killed


@pytest.mark.promises
def test_a_run_killed_at_any_moment_completes(
    long_table: Path, out: Path, undisturbed: dict[tuple[str, int], str | None]
) -> None:
    """Every row has one result, every file is intact, nothing is left over, and the bytes are the same."""
    assert kill_and_continue(long_table, out, random.Random(0), times=2) == 2
    assert hashes(out) == undisturbed
    assert [row["source_row"] for row in results(out)] == list(range(24))
    assert_whole(out)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 9))
def test_a_run_killed_again_and_again_completes(
    long_table: Path, out: Path, undisturbed: dict[tuple[str, int], str | None], seed: int
) -> None:
    kill_and_continue(long_table, out, random.Random(seed), times=8)
    assert hashes(out) == undisturbed
    assert_whole(out)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_images_do_not_depend_on_order_or_split(
    tmp_path: Path, mixed_hashes: dict[tuple[str, int], str | None], seed: int
) -> None:
    random_ = random.Random(seed)
    header, *rows = MIXED
    random_.shuffle(rows)
    cut = sorted(random_.sample(range(len(rows) + 1), 2))
    for number, piece in enumerate((rows[: cut[0]], rows[cut[0] : cut[1]], rows[cut[1] :])):
        write_csv(tmp_path / "tables" / f"{number}.csv", [header, *piece])
    assert run(tmp_path / "tables", tmp_path / "out").code == 0
    assert hashes(tmp_path / "out") == mixed_hashes


@pytest.mark.parametrize(
    ("few", "many"),
    [
        pytest.param(100, 400, marks=pytest.mark.promises),
        pytest.param(2_000, 10_000, marks=pytest.mark.soak),
    ],
)
def test_the_memory_of_a_run_does_not_grow_with_the_table(tmp_path: Path, few: int, many: int) -> None:
    """Each row has one step, so that the number of rows dominates the memory use."""
    peaks = []
    for count in (few, many):
        table = write_csv(tmp_path / f"{count}.csv", [["prompt"], *([f"a red circle {i}"] for i in range(count))])
        options = ("--steps", "1", "--guidance-scale", "1", "--safety", "none")
        with start(table, tmp_path / str(count), *options) as process:
            assert process.wait() == 0
        peaks.append(run_json(tmp_path / str(count))["summary"]["peak_memory"]["host_bytes"])
    assert peaks[1] < 1.15 * peaks[0]


def test_a_second_run_names_the_rows_that_are_still_invalid(tmp_path: Path, out: Path) -> None:
    """Even -q, which prints only problems, names them."""
    long = "a very long prompt " * 40
    table = write_csv(tmp_path / "t.csv", [["prompt", "seed"], ["a red circle", ""], [" ", "1"], [long, ""]])
    first, second = run(table, out), run(table, out, "-q")
    assert (first.code, second.code, second.stderr) == (3, 3, "")
    assert f"invalid  {table}, line 3 (t-00000001): the prompt is empty" in second.stdout.splitlines()
    assert "1 invalid · 1 prompt truncated" in second.stdout
    assert run_json(out)["summary"]["bad_results"] == [f"{table}, line 3 (t-00000001): the prompt is empty"]
    assert "no --model given" in first.stderr
    assert "no --model given" not in run(table, out).stderr, "logged only for a new OUT"
