"""Test that other programs read OUT: the same pixels and metadata as in the results."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from batch_infer.images import hash_pixels
from tests import runs
from tests.tables import write_csv

TYPES = pa.table(
    {
        "prompt": ["a red circle", "a blue square", "a green cross", "a yellow ring"],
        "id": ["one", "two", "flagged", "four"],
        "num_images_per_prompt": [2, 1, 1, 1],
        "image": ["other.png", None, "x", "y"],
        "mask_file_name": ["mask.png", "", None, "z"],
        "input_image": [1, 2, 3, None],
        "map": pa.array([[("k", 1)], None, [], [("l", 2)]], pa.map_(pa.string(), pa.int64())),
        "tags": [["a", "b"], [], None, ["c"]],
        "time": [datetime(2026, 1, 2), None, None, None],
    }
)
OPTIONS = ("--steps", "12", "--on-flagged", "blank")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the OUT of a run with a flagged row and an invalid one. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    pq.write_table(TYPES, folder / "t.parquet")
    write_csv(folder / "u.csv", [["id", "prompt", "width"], ["invalid", "x", "-1"]])
    done = runs.run(folder / "*.*", folder / "out", *OPTIONS, "--max-failed", "1")
    assert done.code == 0, done.stderr
    return folder / "out"


def read_expected(out: Path, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in columns) for row in runs.results(out)]


def read_hashes(out: Path) -> dict[tuple[str, int], str]:
    """Return the hash of the pixels of each image that is not flagged."""
    rows = read_expected(out, "id", "image_index", "status", "pixels_sha256")
    return {(name, index): sha256 for name, index, status, sha256 in rows if status == "ok"}


def load_image_folder(out: Path, cache: Path) -> Any:
    return load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=str(cache))


def hash_image(image: Image.Image) -> str:
    return hash_pixels(np.asarray(image.convert("RGB")))


def test_datasets_reads_an_image_folder(finished: Path, tmp_path: Path) -> None:
    """The black image of the flagged row is left out. Carried columns do not hide the image."""
    dataset = load_image_folder(finished, tmp_path)
    rows = {(row["id"], row["image_index"]): row for row in dataset}
    assert {key: hash_image(row["image"]) for key, row in rows.items()} == read_hashes(finished)
    one, two = rows["one", 0], rows["two", 0]
    assert (one["prompt"], one["tags"], one["input_input_image"]) == ("a red circle", ["a", "b"], "other.png")
    assert (one["mask_file_name_"], one["input_image"], two["input_image"]) == ("mask.png", 1, 2)
    assert (one["map"], two["map"]) == ('[["k", 1]]', None)
    assert {score["category"] for score in one["safety_scores"]} >= {"concept_0"}
    expected = {(row["id"], row["image_index"]): row for row in runs.results(finished)}
    for name in ("seed", "width", "guidance_scale", "sha256", "nsfw_content_detected", "source_file", "fingerprint"):
        assert {key: row[name] for key, row in rows.items()} == {key: expected[key][name] for key in rows}


def test_an_image_folder_without_images_is_not_loaded_as_one_of_placeholders(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["id", "prompt"], ["flagged", "a green cross"]])
    assert runs.run(table, tmp_path / "out", *OPTIONS).code == 0
    assert runs.images(tmp_path / "out")
    with pytest.raises(ValueError, match="BatchSize must be greater than 0"):
        load_image_folder(tmp_path / "out", tmp_path / "cache")


def test_carried_columns_with_names_of_image_folders_do_not_hide_the_image(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt", "file_name", "image"], ["a red circle", "x", "y"]])
    assert runs.run(table, tmp_path / "out", "--safety", "none").code == 0
    (row,) = load_image_folder(tmp_path / "out", tmp_path / "cache")
    assert (row["image"].size, row["file_name_"], row["input_image"]) == ((64, 64), "x", "y")


def test_another_programs_metadata_is_kept(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    pq.write_table(pa.table({"file_name": ["mine"]}), out / "metadata.parquet")
    (out / "run.json").write_text((out / "run.json").read_text().replace(str(finished.parent), str(tmp_path)))
    done = runs.command("merge", out)
    assert done.code == 0
    assert "metadata.parquet was not written by batch-infer, so it is kept" in done.stderr
    assert pq.read_table(out / "metadata.parquet").to_pydict() == {"file_name": ["mine"]}
    (out / "metadata.parquet").unlink()
    assert runs.command("merge", out).code == 0
    assert len(pq.read_table(out / "metadata.parquet")) == len(read_hashes(finished))


def test_edited_metadata_is_a_problem_for_verify(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    table = pq.read_table(out / "metadata.parquet")
    pq.write_table(table.slice(1), out / "metadata.parquet")
    done = runs.command("verify", out)
    assert done.code == 3
    assert "metadata.parquet" in done.stdout


def test_pandas_keeps_nullable_integers(finished: Path) -> None:
    frame = pd.read_parquet(finished / "results.parquet", dtype_backend="pyarrow")
    columns = ("id", "image_index", "seed", "height", "prompt_tokens", "input_image", "nsfw_content_detected", "sha256")
    rows = [tuple(None if pd.isna(cell) else cell for cell in row) for row in frame[list(columns)].to_numpy(object)]
    assert rows == read_expected(finished, *columns)
    assert [str(frame[name].dtype) for name in ("seed", "height", "input_image")] == [
        *("int64[pyarrow]", "int32[pyarrow]", "int64[pyarrow]")
    ]
    assert_same_pixels(finished, zip(frame["generated_image"], frame["pixels_sha256"], strict=True))


def test_polars_reads_results(finished: Path) -> None:
    frame = polars.read_parquet(finished / "results.parquet")
    columns = ("id", "image_index", "status", "seed", "nsfw_content_detected", "tags", "finished_at")
    assert frame.select(columns).rows() == read_expected(finished, *columns)
    scores = frame.explode("safety_scores").unnest("safety_scores").filter(polars.col("id") == "two")
    expected = next(row["safety_scores"] for row in runs.results(finished) if row["id"] == "two")
    assert dict(scores.select("category", "score").rows()) == expected
    assert_same_pixels(finished, frame.select("generated_image", "pixels_sha256").rows())


def query(sql: str) -> list[tuple[Any, ...]]:
    relation = duckdb.sql(sql)
    assert relation is not None
    return list(relation.fetchall())


def test_duckdb_reads_results(finished: Path) -> None:
    columns = ("id", "image_index", "status", "seed", "nsfw_content_detected", "error", "tags")
    rows = query(f"SELECT {', '.join(columns)} FROM '{finished}/results.parquet'")
    assert rows == read_expected(finished, *columns)
    highest = query(
        "SELECT id, max(s.score) FROM (SELECT id, unnest(safety_scores) AS s FROM"
        f" '{finished}/manifest/part-*.parquet') GROUP BY id"
    )
    expected: dict[str, float] = {}
    for row in runs.results(finished):
        if row["safety_scores"]:
            expected[row["id"]] = max(*row["safety_scores"].values(), expected.get(row["id"], -1.0))
    assert dict(highest) == expected
    paths = query(f"SELECT generated_image, pixels_sha256 FROM '{finished}/results.parquet'")
    assert_same_pixels(finished, paths)


def assert_same_pixels(out: Path, images: Iterable[tuple[Any, Any]]) -> None:
    """Check that there are images, given by their paths in OUT, and that their pixels have these hashes."""
    hashes = [(path, sha256) for path, sha256 in images if not pd.isna(path)]
    assert len(hashes) == len(TYPES) + 1
    for path, sha256 in hashes:
        with Image.open(out / path) as image:
            assert hash_image(image) == sha256
