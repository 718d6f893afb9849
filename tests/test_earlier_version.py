"""Test that an OUT of an earlier version can be continued, merged, rescored and retried without rendering again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batch_infer.azureml import batch
from batch_infer.records import BOOKKEEPING, Source, digest
from batch_infer.table.columns import MAX_CARRIED_BYTES
from batch_infer.table.rows import RowCells, make_invalid
from tests.runs import CommandResult, Key, assert_whole, command, images, results, run_json
from tests.tables import to_rows, write_csv

DATA = Path(__file__).parent / "data" / "earlier_version"
COMPUTE = ("--slots", "8", "--threads", "1", "--device", "cpu", "--num-processes", "0")
SHORT_RUN = ("--steps", "2", "--on-flagged", "keep")
FORMATS = {"blank": "jpeg", "blur": "webp", "quarantine": "png", "drop": "png"}
OPTIONS = {
    "keep": ("keep.csv", "--steps", "12", "--images-per-prompt", "2", "--on-flagged", "keep", "--results", "csv"),
    "carried": ("shards", "--steps", "2", "--width", "32", "--height", "32", "--safety", "none", "--image-format",
                "webp"),
    **{policy: ("flagged.csv", "--guidance-scale", "5", "--on-flagged", policy, "--image-format", image_format)
       for policy, image_format in FORMATS.items()},
}  # fmt: skip
"""The table and options of the run in each folder."""
EXIT_CODES = {"keep": 3}
"""Exit codes other than 0. One row of `keep` is invalid."""

every_run = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy all folders to a new working folder, and set the paths of the tables in their run.json files."""
    folder = tmp_path / "earlier"
    shutil.copytree(DATA, folder)
    for path in folder.glob("*/run.json"):
        path.write_text(path.read_text().replace("FOLDER", str(folder)))
    monkeypatch.chdir(folder)
    return folder


def run(folder: Path, name: str, *options: str) -> CommandResult:
    table, *run_options = OPTIONS[name]
    return command("run", table, "-o", folder / name, *COMPUTE, *run_options, *options)


def count_rendered(result: CommandResult, code: int = 0) -> int:
    """Return how many images the command rendered, after checking its exit code."""
    assert result.code == code, result.stderr
    return int(json.loads(result.stdout)["rendered"])


def read_parts(out: Path) -> dict[Key, dict[str, Any]]:
    """Return the rows of all manifest parts in OUT by key, after checking that no key occurs twice."""
    rows: dict[Key, dict[str, Any]] = {}
    for part in (out / "manifest").glob("part-*.parquet"):
        for row in to_rows(pq.read_table(part)):
            assert rows.setdefault((row["id"], row["image_index"]), row) is row
    return rows


def assert_unchanged(out: Path, before: Mapping[Key, Mapping[str, Any]]) -> None:
    """Check that results.parquet contains the earlier rows, except bookkeeping, and that the images match them."""
    rows = {(row["id"], row["image_index"]): row for row in results(out)}
    assert rows.keys() == before.keys()
    for key, row in before.items():
        assert {name: rows[key][name] for name in row if name not in {*BOOKKEEPING, "n"}} == {
            name: value for name, value in row.items() if name not in {*BOOKKEEPING, "n"}
        }
        assert rows[key]["attempt"] == row["attempt"]
    assert_whole(out)


def undo_end(out: Path) -> None:
    """Turn a finished run into one that was killed just before its end."""
    (out / "run.json").write_text(json.dumps({**run_json(out), "finished_at": None, "summary": None}))
    (out / ".tmp-0123abcd-1-0123456789ab-results.parquet").write_bytes(b"half")


@every_run
def test_a_finished_run_is_continued(folder: Path, name: str) -> None:
    before = read_parts(folder / name)
    assert count_rendered(run(folder, name, "--json"), EXIT_CODES.get(name, 0)) == 0
    assert_unchanged(folder / name, before)


@pytest.mark.parametrize("name", ["keep", "quarantine"])
def test_a_killed_run_is_continued(folder: Path, name: str) -> None:
    before = read_parts(folder / name)
    undo_end(folder / name)
    report = json.loads(command("status", folder / name, "--json").stdout)
    assert (report["state"], report["left"]) == ("stopped", 0)
    assert count_rendered(run(folder, name, "--json"), EXIT_CODES.get(name, 0)) == 0
    assert_unchanged(folder / name, before)


def test_only_the_new_row_of_a_longer_table_is_rendered(folder: Path) -> None:
    out, before = folder / "keep", read_parts(folder / "keep")
    with (folder / "keep.csv").open("a") as table:
        table.write("a large red disc,,,,,new,5,1\n")
    assert count_rendered(run(folder, "keep", "--json"), 3) == 2
    rows = {(row["id"], row["image_index"]): row for row in results(out)}
    assert rows.keys() - before.keys() == {("keep-00000004", 0), ("keep-00000004", 1)}
    assert all(rows[key]["sha256"] == row["sha256"] for key, row in before.items())
    assert_whole(out)


@every_run
@pytest.mark.parametrize("has_tables", [True, False])
def test_an_out_of_an_earlier_version_is_merged(folder: Path, name: str, has_tables: bool) -> None:
    before = read_parts(folder / name)
    if not has_tables:
        for table in ("keep.csv", "flagged.csv"):
            (folder / table).unlink()
        shutil.rmtree(folder / "shards")
    assert command("merge", folder / name, "-q").code == 0
    assert_unchanged(folder / name, before)


@every_run
def test_status_counts_the_results_of_an_earlier_version(folder: Path, name: str) -> None:
    report = json.loads(command("status", folder / name, "--json").stdout)
    assert (report["state"], report["left"]) == ("finished", 0)
    counts = Counter(row["status"] for row in read_parts(folder / name).values())
    assert report["counts"] == {status: counts[status] for status in report["counts"]}


@every_run
def test_an_out_of_an_earlier_version_is_rescored_and_continued(folder: Path, name: str) -> None:
    """The checkers may differ from those of the run. No image is lost, and the run can be continued."""
    out, before = folder / name, read_parts(folder / name)
    checks = ("--safety", "checker", "--on-flagged", name if name in FORMATS else "keep")
    policy = checks[2:] if name == "carried" else ()  # the other runs keep theirs
    result = command("rescore", out, *checks[:2], *policy, "--json")
    assert (result.code, json.loads(result.stdout)["failed"]) == (0, 0), result.stderr
    assert count_rendered(run(folder, name, *checks, "--json"), EXIT_CODES.get(name, 0)) == 0
    rows = {(row["id"], row["image_index"]): row for row in results(out)}
    flagged = [key for key, row in rows.items() if row["status"] == "flagged"]
    if name != "carried":
        assert flagged == [key for key, row in before.items() if row["status"] == "flagged"]
    for key in rows.keys() - set(flagged):
        assert rows[key]["sha256"] == before[key]["sha256"]
    assert_whole(out)


@every_run
def test_retry_renders_nothing_if_no_image_is_missing(folder: Path, name: str) -> None:
    before = read_parts(folder / name)
    result = command("retry", folder / name, "--status", "failed", "--status", "missing", "--json")
    assert count_rendered(result, EXIT_CODES.get(name, 0)) == 0
    assert_unchanged(folder / name, before)


@pytest.mark.parametrize("name", ["keep", "carried"])
def test_missing_images_are_rendered_identically(folder: Path, name: str) -> None:
    """Seeds, sizes and settings are those of the earlier version. On another machine, the last bit may differ."""
    out = folder / name
    before = {path: np.asarray(Image.open(out / path)).astype(int) for path in images(out)}
    for path in before:
        (out / path).unlink()
    result = command("retry", out, "--status", "missing", "--json")
    assert count_rendered(result, EXIT_CODES.get(name, 0)) == len(before)
    assert images(out) == before.keys()
    max_difference = {"keep": 1, "carried": 40}[name]  # WebP is lossy
    for path, pixels in before.items():
        assert np.abs(np.asarray(Image.open(out / path)).astype(int) - pixels).max() <= max_difference
    assert_whole(out)


def test_a_killed_rescore_is_continued(folder: Path) -> None:
    """The killed rescore had finished its first image."""
    out = folder / "rescoring"
    assert json.loads(command("status", out, "--json").stdout)["state"] == "rescoring"
    hashes = {hashlib.sha256((out / path).read_bytes()).hexdigest() for path in images(out)}
    result = command("rescore", out, "--safety", "checker", "--on-flagged", "quarantine", "--json")
    report = json.loads(result.stdout)
    assert (result.code, report["judged"], report["failed"]) == (0, 1, 0), result.stderr
    assert {row["id"]: row["status"] for row in results(out)} == {"cross": "flagged", "Blue Square": "ok"}
    assert {row["sha256"] for row in results(out)} == hashes
    assert_whole(out)


def test_the_output_of_an_endpoint_is_continued_and_merged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, before = folder / "endpoint", read_parts(folder / "endpoint")
    options = {"SLOTS": "8", "THREADS": "1", "DEVICE": "cpu", "GUIDANCE_SCALE": "5", "IMAGE_FORMAT": "webp"}
    for name, value in {**options, "ON_FLAGGED": "keep"}.items():
        monkeypatch.setenv(f"BATCH_INFER_{name}", value)
    monkeypatch.setenv("AZUREML_BI_OUTPUT_PATH", str(out))
    for name in ("AZUREML_MODEL_DIR", "AZ_BATCHAI_GPU_COUNT_FOUND", "CONTENT_SAFETY_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert json.loads(command("status", out, "--json").stdout)["state"] == "open"
    parts = sorted((out / "manifest").glob("part-*"))
    try:
        batch.init()
        scored = batch.run([str(folder / "flagged.csv")])
    finally:
        batch.shutdown()
    assert sorted((out / "manifest").glob("part-*")) == parts
    assert set(scored["sha256"]) == {row["sha256"] for row in before.values()}
    assert command("merge", out, "-q").code == 0
    assert_unchanged(out, before)


@pytest.fixture
def unlimited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an OUT that was made without limits for texts and carried cells. One long row is new in its table."""
    table, out = tmp_path / "t.csv", tmp_path / "out"
    rows = [["prompt", "negative_prompt", "note", "num_images_per_prompt"], ["a red disc", "", "", ""]]
    rows += [["a red disc" + " " * 10_000, "", "", "2"], ["a disc", "x" * 10_001, "", ""]]
    write_csv(table, [*rows, ["a blue disc", "", "y" * (MAX_CARRIED_BYTES + 1), ""]])
    with monkeypatch.context() as patch:
        patch.setattr("batch_infer.table.rows.MAX_TEXT_LENGTH", 1 << 30)
        patch.setattr("batch_infer.table.columns.MAX_CARRIED_BYTES", 1 << 30)
        assert command("run", table, "-o", out, *COMPUTE, *SHORT_RUN).code == 0
    with table.open("a") as stream:
        stream.write("z" * 10_001 + ",,,\n")
    return out


def test_a_finished_row_over_the_size_limit_is_kept(unlimited: Path) -> None:
    """Every command keeps its images, but a new row of this size is invalid."""
    out, table = unlimited, unlimited.with_name("t.csv")
    before = read_parts(out)
    for line in (
        ("run", table, "-o", out, *COMPUTE, *SHORT_RUN),
        ("merge", out),
        ("retry", out, "--status", "missing", "--status", "failed"),
        ("rescore", out, "--safety", "checker", "--on-flagged", "quarantine"),
        ("run", table, "-o", out, *COMPUTE, *SHORT_RUN[:2], "--on-flagged", "quarantine"),
    ):
        assert command(*line).code in (0, 3), line
        rows = {(row["id"], row["image_index"]): row for row in results(out)}
        assert rows.pop(("t-00000004", 0))["error"].startswith("the prompt has 10001 characters")
        assert {key: row["sha256"] for key, row in rows.items()} == {key: row["sha256"] for key, row in before.items()}
        assert {row["status"] for row in rows.values()} <= {"ok", "flagged"}
    assert_whole(out)
    plan = json.loads(command("plan", table, "-o", out, *COMPUTE, *SHORT_RUN[:2], "--json").stdout)
    assert (plan["done"], plan["pending"], plan["invalid"]) == (5, 0, 1)


def test_a_finished_row_over_the_size_limit_is_not_rendered_again(unlimited: Path) -> None:
    """Options that would replace it are refused. With --rerender-changed, the row is invalid."""
    out, table = unlimited, unlimited.with_name("t.csv")
    other = ("run", table, "-o", out, *COMPUTE, "--steps", "3", "--on-flagged", "keep")
    refused = command(*other)
    assert refused.code == 2 and "finished images in" in refused.stderr
    assert count_rendered(command(*other, "--rerender-changed", "--json"), 3) == 1
    assert [row["status"] for row in results(out)] == ["ok", *["invalid"] * 4]


@pytest.mark.parametrize(
    ("error", "earlier"),
    [
        ("duplicate id 'a'", "the id 'a' stands twice"),
        ("line 3 is not valid: it is not JSON: Expecting value", "line 3 is not valid: it is no JSON: Expecting value"),
        (
            "element 1 has 3 cells, but the number of columns is 2",
            "element 1 has 3 cells where columns names 2",
        ),
        (
            "the file breaks off here: '\"' instead of , or ]",
            "the file breaks off here: '\"' stands where , or ] should",
        ),
        ("the file breaks off here: 'x' after its end", "the file breaks off here: 'x' stands after its end"),
        (
            "the row's carried cells exceed 1048576 bytes in total: dropped 'a' of 2000000 bytes",
            "the carried cells of a row may be 1048576 bytes together: left out 'a' of 2000000 bytes",
        ),
        (
            "line 2 has 4 cells, but the header has 2; quote cells that contain commas",
            "line 2 has 4 cells where the header names 2; quote cells that hold commas",
        ),
        (
            "the prompt has 10001 characters; the maximum is 10000 (a model reads about 75 tokens)",
            "the prompt has 10001 characters, and 10000 are the most: a model reads some 75 words",
        ),
        (
            "the id has 10001 characters; the maximum is 10000",
            "the id has 10001 characters, and 10000 are the most",
        ),
        (
            "t.csv has 1025 columns; the maximum is 1024: leave out some",
            "t.csv has 1025 columns, and 1024 are the most: leave out some",
        ),
        (
            "a.docx: unknown file extension .docx; a table ends in .csv",
            "a.docx: unknown ending .docx; a table ends in .csv",
        ),
        (
            't.json is not a supported table: a .json file contains [{"prompt": ...}, ...], ["a prompt", ...] or '
            '{"input_data": {"columns": ["prompt"], "data": [...]}}, or one object with a prompt per line',
            't.json is no table: a .json holds [{"prompt": ...}, ...], ["a prompt", ...] or '
            '{"input_data": {"columns": ["prompt"], "data": [...]}}, or one object with a prompt a line',
        ),
        ("the id must be text or a number, not a list", "the id is not text but list"),
        (
            "negative_prompt 'green' is given, but this model does not support it",
            "negative_prompt 'green' is given, and this model takes none",
        ),
        (
            "seed 9223372036854775807 is too large for 2 images: image k uses seed + k, and the maximum is "
            "9223372036854775807",
            "seed 9223372036854775807 leaves no room for 2 images (seed + k)",
        ),
        ("prompt contains a NUL byte", "prompt holds a NUL byte"),
        (
            "the prompt contains a lone surrogate, which is half a character: send whole characters",
            "the prompt holds a lone surrogate, which is half a character: send whole ones",
        ),
        (
            "column 'prompt' contains a lone surrogate, which is half a character: write whole characters",
            "column 'prompt' holds a lone surrogate, which is half a character: write whole characters",
        ),
        ("t: the folder contains no table (.csv)", "t: the folder holds no table (.csv)"),
        (
            "line 2 has no custom_id and body, unlike the first line",
            "line 2 has no custom_id and body, as the first line has",
        ),
        (
            "line 2 has a body that is not a JSON object but str",
            "line 2 has no custom_id and body, as the first line has",
        ),
        ("t/a.csv: the target of the link does not exist", "t/a.csv: the link leads to no file"),
        (
            'line 3 has an unsupported column "it\'s": its name is not UTF-8, or the table already has 1024 columns',
            'line 3 has a column that the table cannot have, "it\'s": it is not UTF-8, or there are 1024 before it',
        ),
        (
            "line 2 has an unsupported column '': its name is not UTF-8, or the table already has 1024 columns",
            "line 2 has a column that the table cannot have, '': it is not UTF-8, or there are 1024 before it",
        ),
        ("the prompt is empty", "the prompt is empty"),
    ],
)
def test_fingerprints_of_invalid_rows_do_not_depend_on_the_wording(error: str, earlier: str) -> None:
    row = make_invalid(RowCells("a", Source("t.csv", 0), {"prompt": None}, {}), error)
    assert row.error == error
    assert row.fingerprint == digest(["invalid", earlier, "{'prompt': None}"])
