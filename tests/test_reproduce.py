"""A sample of results is rendered again, and compared with what the manifest records."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import save_file

from batch_infer.cli.progress import ProgressGroup
from batch_infer.errors import SettingsError, StoppedError
from batch_infer.images import decode, encode, hash_pixels
from batch_infer.jobs import Sample
from batch_infer.jobs import out as outdir
from batch_infer.jobs.verify.reproduce import choose_sample, reproduce
from batch_infer.manifest import SCHEMA, Manifest, read_part
from batch_infer.records import ResultRow
from batch_infer.store import open_store
from tests.loras import as_peft, make_layers
from tests.oracle import load_pipeline
from tests.rendering import copy_folder
from tests.runs import images, results, run, run_json
from tests.tables import to_rows, write_csv

ROWS = [
    ["id", "prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "num_images_per_prompt"],
    ["a", "a red circle", "", "", "", "", "1"],
    ["b", "a blue square", "red", "5", "3", "7.123456", "3"],
    ["c", "a green star", "", "9", "", "1", "1"],
    ["d", "", "", "", "", "", ""],
]
IMAGES = 5


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table") / "t.csv", ROWS)


@pytest.fixture(scope="module")
def rendered(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five images, which tests copy."""
    out = tmp_path_factory.mktemp("rendered") / "out"
    assert run(table, out, "--negative-prompt", "blurry", "--guidance-rescale", "0.3").code == 3, "a row is invalid"
    return out


@pytest.fixture
def out(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "out"))


def sample(out: Path, count: int = 100, seed: int = 0, **options: Any) -> Sample:
    store = open_store(out)
    with Manifest(store).index() as index:
        images = choose_sample(index, count, seed)
        return reproduce(store, outdir.read_existing_run(store), index, images, ProgressGroup(), **options)


def edit(out: Path, name: str, image_index: int = 0, **changes: Any) -> None:
    """Rewrite the parts of OUT with one result changed."""
    for part in Manifest(out).parts():
        table = read_part(part)
        rows = [ResultRow(**row) for row in to_rows(table.select(SCHEMA.names))]
        rows = [replace(row, **changes) if row.key == (name, image_index) else row for row in rows]
        (out / "manifest" / part.name).unlink()
        Manifest(out, 1).commit(rows, table.drop_columns(SCHEMA.names).schema)


def edit_carried(out: Path, name: str, values: list[Any]) -> None:
    """Replace the cells of a carried column, in the order of the rows in the table."""
    parts = Manifest(out).parts()
    table = pa.concat_tables(map(read_part, parts)).sort_by("source_row")
    carried = table.drop_columns(SCHEMA.names).schema
    rows = to_rows(table.select(SCHEMA.names))
    for part in parts:
        (out / "manifest" / part.name).unlink()
    Manifest(out, 1).commit(
        [ResultRow(**row, carried={name: value}) for row, value in zip(rows, values, strict=True)], carried
    )


def edit_run(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = run_json(out)
    change(record)
    (out / "run.json").write_text(json.dumps(record))


def problems(outcome: Sample) -> list[tuple[str | None, int | None]]:
    return [(problem.id, problem.image_index) for problem in outcome.problems]


def test_an_untouched_run_is_reproduced(out: Path, table: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    outcome = sample(out)
    assert outcome == Sample(rendered=IMAGES, equal_bytes=IMAGES, equal_pixels=IMAGES)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before, "OUT is not changed"


def test_settings_of_the_run_are_kept(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--slots", "6", "--scheduler", "euler a", "--image-format", "jpeg", "--seed", "3", "--height", "80")
    assert run(table, out, *options, "--images-per-prompt", "2").code == 3
    outcome = sample(out)
    assert (outcome.rendered, outcome.equal_bytes, outcome.environment) == (IMAGES, IMAGES, {})


@pytest.mark.parametrize("policy", ["blank", "blur", "drop"])
def test_flagged_images_are_reproduced_as_they_were_stored(table: Path, tmp_path: Path, policy: str) -> None:
    out = tmp_path / "out"
    assert run(table, out, "--on-flagged", policy).code == 3
    assert any(row["status"] == "flagged" for row in results(out))
    outcome = sample(out)
    assert (outcome.rendered, outcome.problems) == (len(images(out)), [])
    assert outcome.equal_bytes == outcome.rendered


def test_the_table_is_not_needed(table: Path, tmp_path: Path) -> None:
    moved = shutil.copy(table, tmp_path / "t.csv")
    assert run(moved, tmp_path / "out").code == 3
    Path(moved).unlink()
    assert sample(tmp_path / "out").equal_bytes == IMAGES


@pytest.mark.parametrize(
    "changes",
    [{"seed": 60}, {"prompt": "a red square"}, {"guidance_scale": 3.0}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_cell_is_found(out: Path, changes: dict[str, Any]) -> None:
    edit(out, "b", 1, **changes)
    outcome = sample(out)
    assert problems(outcome) == [("b", 1)]
    assert (outcome.rendered, outcome.equal_bytes) == (IMAGES, IMAGES - 1)
    problem = outcome.problems[0]
    assert problem.kind == "not_reproduced"
    assert problem.path == next(row["generated_image"] for row in results(out)
                                if (row["id"], row["image_index"]) == ("b", 1))  # fmt: skip
    assert "the recorded cells do not match the fingerprint" in problem.detail
    assert outcome.largest is None or "largest difference" in problem.detail


def test_a_cell_that_is_invalid_now_is_a_problem(out: Path) -> None:
    edit(out, "c", height=33)
    outcome = sample(out)
    assert (problems(outcome), outcome.rendered) == ([("c", 0)], IMAGES - 1)
    assert "ends with invalid: height 33 is not a multiple of" in outcome.problems[0].detail


def test_another_status_is_a_problem(out: Path) -> None:
    row = next(row for row in results(out) if row["id"] == "a")
    other = "ok" if row["status"] == "flagged" else "flagged"
    edit(out, "a", status=other)
    assert sample(out).problems[0].detail.startswith(f"its status is {other}, and rendering it again gives")


def claim_another_torch(record: dict[str, Any]) -> None:
    record["versions"]["torch"] = "1.0"


def test_pixels_are_compared_if_versions_differ(out: Path) -> None:
    edit_run(out, claim_another_torch)
    outcome = sample(out)
    assert (outcome.equal_bytes, outcome.problems) == (IMAGES, [])
    assert outcome.environment["versions.torch"][0] == "1.0"
    assert list(outcome.environment) == ["versions.torch"]
    change_pixels(out, "a", 80)
    outcome = sample(out)
    assert problems(outcome) == [("a", 0)]
    assert outcome.psnr_min is not None
    assert outcome.psnr_min < 30


def change_pixels(out: Path, name: str, difference: int) -> None:
    """Replace the image of a row, in its file and in the manifest, by one whose pixels differ by at most this much."""
    row = next(row for row in results(out) if (row["id"], row["image_index"]) == (name, 0))
    path = out / row["generated_image"]
    pixels = np.clip(decode(path.read_bytes()).astype(int) + difference, 0, 255).astype(np.uint8)
    content = encode(pixels, "png", "")
    path.write_bytes(content)
    edit(out, name, sha256=hashlib.sha256(content).hexdigest(), image_bytes=len(content),
         pixels_sha256=hash_pixels(pixels))  # fmt: skip


def test_small_differences_are_allowed_only_if_versions_differ(out: Path) -> None:
    change_pixels(out, "a", 2)
    outcome = sample(out)
    assert (problems(outcome), outcome.largest) == ([("a", 0)], 2)
    assert "largest difference 2 of 255" in outcome.problems[0].detail
    edit_run(out, claim_another_torch)
    outcome = sample(out)
    assert (outcome.problems, outcome.largest, outcome.equal_bytes) == ([], 2, IMAGES - 1)
    edit(out, "a", fingerprint="f")
    assert problems(sample(out)) == [("a", 0)], "the recorded cells are those of another request"
    assert outcome.psnr_min is not None
    assert outcome.psnr_min > 40


def test_a_missing_image_is_left_to_other_checks(out: Path) -> None:
    for name in images(out):
        (out / name).unlink()
    assert sample(out).equal_bytes == IMAGES
    edit(out, "a", sha256="0" * 64)
    assert sample(out).problems[0].detail == "bytes differ, pixels are equal"
    edit(out, "a", pixels_sha256="0" * 64)
    outcome = sample(out)
    assert outcome.problems[0].detail.startswith("its pixels have another hash than the recorded one")
    edit_run(out, claim_another_torch)
    assert sample(out).problems == []


def test_another_model_is_refused(table: Path, tmp_path: Path, sd1_folder: Path, sd2_folder: Path) -> None:
    out, model = tmp_path / "out", copy_folder(sd1_folder, tmp_path)
    assert run(table, out, "--model", model, "--height", "32", "--width", "32").code == 3
    assert sample(out, 2).equal_bytes == 2
    shutil.rmtree(model)
    shutil.copytree(sd2_folder, model)
    with pytest.raises(SettingsError, match="was made with model .*, but its settings now give model .*") as caught:
        sample(out, 2)
    assert caught.value.exit_code == 2


def test_the_lora_of_each_row_is_used(tmp_path: Path, sd1_folder: Path) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    layers = make_layers(load_pipeline(sd1_folder), "unet")
    save_file({name: tensor.clone() for name, tensor in as_peft(layers).items()}, loras / "style.safetensors")
    table = write_csv(tmp_path / "t.csv", [["prompt", "lora"], ["a red circle", "style:0.5"], ["a red circle", ""]])
    out = tmp_path / "out"
    size = ("--height", "32", "--width", "32")
    assert run(table, out, "--model", sd1_folder, "--lora-folder", loras, *size, "--safety", "none").code == 0
    assert sample(out).equal_bytes == 2
    edit_carried(out, "lora", ["style", None])
    outcome = sample(out)
    assert (len(outcome.problems), outcome.equal_bytes) == (1, 1)


def test_each_image_is_compared_with_the_environment_of_its_run(table: Path, tmp_path: Path) -> None:
    """A later run with another version, even one with nothing to do, does not change how an image was rendered."""
    out = tmp_path / "out"
    assert run(table, out, "--limit", "2").code == 0
    edit_run(out, claim_another_torch)
    assert run(table, out).code == 3
    first, second = run_json(out)["environments"]
    assert (first["versions"]["torch"], first["run_number"], second["run_number"]) == ("1.0", 0, 2)
    change_pixels(out, "a", 2)
    outcome = sample(out)
    assert (outcome.problems, outcome.environment["versions.torch"][0]) == ([], "1.0")
    assert run(table, out).code == 3
    assert len(run_json(out)["environments"]) == 2


def test_images_with_another_number_of_slots_may_differ(out: Path) -> None:
    """The number is halved if a GPU runs out of memory."""
    edit(out, "a", slots=2)
    change_pixels(out, "a", 2)
    outcome = sample(out)
    assert (outcome.problems, outcome.environment) == ([], {"slots": (2, 8)})


def test_a_stop_ends_it(out: Path) -> None:
    with pytest.raises(StoppedError):
        sample(out, stop=lambda: True)


def test_the_sample_depends_on_the_seed_and_not_on_the_parts(out: Path) -> None:
    def choose(count: int, seed: int) -> set[tuple[str, int]]:
        with Manifest(out).index() as index:
            chosen = choose_sample(index, count, seed)
            rows = index.read_results(chosen).to_pylist()
        return {(row["id"], row["image_index"]) for row in rows}

    assert len(choose(100, 0)) == IMAGES, "without the invalid row"
    assert all(len(choose(2, seed)) == 2 for seed in range(20))
    samples = [choose(2, seed) for seed in range(20)]
    assert set[tuple[str, int]]().union(*samples) == choose(100, 0)
    assert choose(1, 7) < choose(2, 7) < choose(3, 7)
    (part, *_) = Manifest(out).parts()
    table = read_part(part)
    rows = [ResultRow(**row) for row in to_rows(table.select(SCHEMA.names))]
    for row in rows:  # attempts that were replaced, and later ones, in parts of their own
        Manifest(out, 1).commit([replace(row, attempt=0)], table.drop_columns(SCHEMA.names).schema)
        Manifest(out, 2).commit([replace(row, attempt=2)], table.drop_columns(SCHEMA.names).schema)
    assert [choose(2, seed) for seed in range(20)] == samples
    assert len(choose(100, 0)) == IMAGES


def test_an_empty_sample_renders_nothing(out: Path) -> None:
    assert sample(out, 0) == Sample()
