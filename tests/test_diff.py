"""`batch-infer diff`: which results of two runs differ, and in what."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from batch_infer.cli import commands
from batch_infer.errors import StoppedError, UsageError
from batch_infer.images import hash_pixels
from batch_infer.jobs import diff_runs
from batch_infer.jobs.diff.settings import _OPTION_NAMES
from batch_infer.manifest import Manifest
from batch_infer.records import ResultRow
from tests.runs import command, results, run, run_json
from tests.tables import write_csv

PROMPTS = ("a red circle", "a blue square", "a green star")
EQUAL = {"only_a": 0, "only_b": 0, "status": 0, "settings": {"run": {}, "columns": {}}, "bytes": 0, "pixels": 0,
         "largest": None, "psnr_min": None, "differences": []}  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", [["id", "prompt"], *zip("abc", PROMPTS, strict=True)])


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three images, which tests copy."""
    folder = tmp_path_factory.mktemp("rendered")
    table = write_csv(folder / "t.csv", [["id", "prompt"], *zip("abc", PROMPTS, strict=True)])
    assert run(table, folder / "out").code == 0
    return folder / "out"


@pytest.fixture
def out_a(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "a"))


@pytest.fixture
def out_b(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "b"))


def diff(out_a: Path, out_b: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = command("diff", out_a, out_b, "--json", *options)
    assert done.stdout, done.stderr
    return done.code, dict(json.loads(done.stdout))


def text(out_a: Path, out_b: Path) -> str:
    return command("diff", out_a, out_b, "--no-progress").stdout


def find(report: dict[str, Any], name: str, image_index: int = 0) -> dict[str, Any]:
    matches = [entry for entry in report["differences"] if (entry["id"], entry["image_index"]) == (name, image_index)]
    assert len(matches) == 1
    return dict(matches[0])


# Rendered runs


def test_the_same_work_twice_is_equal(rendered: Path, table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    first, second = results(rendered)[0], results(out)[0]
    assert first["finished_at"] != second["finished_at"], "bookkeeping differs"
    assert diff(rendered, out) == (0, {"rows": 3, "equal": 3, **EQUAL})
    assert command("diff", rendered, out, "-q").stdout == ""
    assert "3 results in both: 3 equal, 0 different" in text(rendered, out)


def test_an_option_that_differs_is_named(rendered: Path, table: Path, out: Path) -> None:
    assert run(table, out, "--steps", "3").code == 0
    code, report = diff(rendered, out)
    assert (code, report["rows"], report["equal"], report["bytes"], report["pixels"]) == (3, 3, 0, 3, 3)
    assert report["settings"]["run"] == {"--steps": [2, 3]}
    assert report["settings"]["columns"]["num_inference_steps"] == 3
    assert 0 < report["largest"] <= 255
    assert report["psnr_min"] == min(entry["psnr"] for entry in report["differences"])
    assert [entry["id"] for entry in report["differences"]] == ["a", "b", "c"]
    assert find(report, "a")["kinds"] == ["bytes", "pixels", "settings"]
    assert "num_inference_steps 2 in A, 3 in B" in find(report, "a")["detail"]
    assert "  --steps: 2 in A, 3 in B\n" in text(rendered, out)


def test_settings_alone_do_not_make_runs_different(rendered: Path, table: Path, out: Path) -> None:
    assert run(table, out, "--results", "csv", "--max-failed", "5%").code == 0
    code, report = diff(rendered, out)
    assert (code, report["equal"]) == (0, 3)
    assert report["settings"]["run"].keys() == {"--results", "--max-failed"}


def test_a_changed_prompt_and_rows_in_one_run_only(rendered: Path, tmp_path: Path, out: Path) -> None:
    rows = [["id", "prompt"], ["a", PROMPTS[0]], ["b", "a blue circle"], ["d", PROMPTS[2]], ["e", ""]]
    assert run(write_csv(tmp_path / "u" / "t.csv", rows), out).code == 3
    code, report = diff(rendered, out)
    assert (code, report["rows"], report["equal"], report["only_a"], report["only_b"]) == (3, 2, 1, 1, 2)
    assert report["settings"]["columns"]["prompt"] == 1
    assert find(report, "c")["kinds"] == ["only_a"]
    assert find(report, "d")["kinds"] == find(report, "e")["kinds"] == ["only_b"]
    assert find(report, "e")["detail"] == "only in B, invalid"
    assert "1 result only in A\n2 results only in B\n" in text(rendered, out)


def test_a_row_that_failed_in_one_run(rendered: Path, tmp_path: Path, out: Path) -> None:
    rows = [["id", "prompt"], ["a", PROMPTS[0]], ["b", ""], ["c", PROMPTS[2]]]
    assert run(write_csv(tmp_path / "u" / "t.csv", rows), out).code == 3
    code, report = diff(rendered, out)
    assert (code, report["status"], report["bytes"], report["pixels"]) == (3, 1, 1, 0)
    assert {"status", "bytes"} <= set(find(report, "b")["kinds"])
    assert " in A, invalid in B" in find(report, "b")["detail"]
    assert "only A has an image" in find(report, "b")["detail"]


def test_parts_whose_results_were_all_replaced_are_ignored(rendered: Path, tmp_path: Path) -> None:
    rows = [make_row(tmp_path / "a", number, make_image(100)) for number in range(3)]
    out_a, out_b = tmp_path / "a", tmp_path / "b"
    commit(out_a, rendered, [replace(row, seed=1) for row in rows])
    commit(out_a, rendered, [replace(row, attempt=2) for row in rows])
    commit(out_b, rendered, [replace(rows[0], attempt=2)])
    for first, second, kind in ((out_a, out_b, "only_a"), (out_b, out_a, "only_b")):
        code, report = diff(first, second)
        assert (code, report["rows"], report["equal"], report[kind]) == (3, 1, 1, 2)
        assert [(entry["id"], entry["kinds"]) for entry in report["differences"]] == [
            ("row-000001", [kind]),
            ("row-000002", [kind]),
        ]


def test_a_later_attempt_replaces_an_earlier_one(out_a: Path, out_b: Path, table: Path) -> None:
    assert run(table, out_b, "--steps", "3", "--rerender-changed").code == 0
    assert diff(out_a, out_b)[1]["pixels"] == 3
    assert run(table, out_b, "--steps", "2", "--rerender-changed").code == 0
    for first, second in ((out_a, out_b), (out_b, out_a)):
        code, report = diff(first, second)
        assert (code, report["rows"], report["equal"]) == (0, 3, 3)


def test_a_missing_or_damaged_image_is_not_read_if_the_manifests_agree(out_a: Path, out_b: Path) -> None:
    (out_b / results(out_b)[0]["generated_image"]).unlink()
    assert diff(out_a, out_b)[0] == 0


def test_a_missing_or_damaged_image_is_reported_if_the_manifests_differ(rendered: Path, table: Path, out: Path) -> None:
    assert run(table, out, "--steps", "3").code == 0
    paths = {row["id"]: row["generated_image"] for row in results(out)}
    (out / paths["a"]).unlink()
    (out / paths["b"]).write_bytes(b"x" * (out / paths["b"]).stat().st_size)
    code, report = diff(rendered, out)
    assert (code, report["bytes"], report["pixels"]) == (3, 3, 3)
    for name in "ab":
        assert find(report, name)["detail"].count(f"{paths[name]} is missing or damaged in B") == 1
        assert find(report, name)["largest"] is None
    assert find(report, "c")["largest"] == report["largest"]


def test_a_folder_without_a_run_is_refused(rendered: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for pair in ((rendered, tmp_path / "empty"), (tmp_path / "empty", rendered), (rendered, tmp_path / "missing")):
        done = command("diff", *pair)
        assert done.code == 2
        assert "contains no run" in done.stderr
        assert str(pair[1] if pair[0] == rendered else pair[0]) in done.stderr
    assert not (tmp_path / "missing").exists()


def test_nothing_is_written(out_a: Path, out_b: Path) -> None:
    def list_files() -> dict[Path, tuple[int, int]]:
        paths = (path for folder in (out_a, out_b) for path in folder.rglob("*"))
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}

    before = list_files()
    diff(out_a, out_b)
    assert list_files() == before


def test_a_stop_ends_the_comparison(rendered: Path) -> None:
    with pytest.raises(StoppedError):
        diff_runs(rendered, rendered, stop=lambda: True)


def test_the_time_limit_ends_the_command(rendered: Path) -> None:
    done = command("diff", rendered, rendered, "--time-limit", "0.000001")
    assert done.code == 75
    assert "the time limit was reached" in done.stderr


def test_a_damaged_part_is_refused(out_a: Path, rendered: Path) -> None:
    part = next((out_a / "manifest").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(UsageError, match="is damaged"):
        diff_runs(rendered, out_a)


# Settings


def test_versions_devices_and_models_are_compared(rendered: Path, out_b: Path) -> None:
    record = run_json(out_b)
    record["versions"]["torch"] = "1.0"
    record["compute"]["device_name"] = "another"
    record["identity"]["model"] = "f" * 32
    record["started_at"] = "2001-01-01 00:00:00+00:00"
    record["settings"]["out"] = "/elsewhere"
    (out_b / "run.json").write_text(json.dumps(record))
    code, report = diff(rendered, out_b)
    differences = report["settings"]["run"]
    assert code == 0
    assert differences.keys() == {"versions.torch", "compute.device_name", "identity.model"}
    assert differences["versions.torch"][1] == "1.0"
    assert differences["identity.model"][1] == f"built-in demo model ({'f' * 12})"


def test_options_of_settings_exist() -> None:
    names = {name for parameter in commands.commands["run"].params for name in parameter.opts}
    assert set(_OPTION_NAMES.values()) <= names


# Manifests without a model

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


def make_image(shade: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """Return an image (H, W, 3) of one colour."""
    return np.full((*size, 3), shade, np.uint8)


def make_row(out: Path, number: int, pixels: np.ndarray, *, writes: bool = True) -> ResultRow:
    """Store an image in OUT, unless another row stored an equal one, and return its result."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    content = stream.getvalue()
    sha256 = hashlib.sha256(content).hexdigest()
    path = f"images/t-00000/{sha256[:16]}.png"
    if writes and not (out / path).exists():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)
    return ResultRow(
        id=f"row-{number:06}",
        image_index=0,
        prompt=f"prompt {number}",
        generated_image=path,
        status="ok",
        seed=number,
        height=pixels.shape[0],
        width=pixels.shape[1],
        guidance_scale=7.1,
        safety_scores={"nsfw": 0.25},
        sha256=sha256,
        pixels_sha256=hash_pixels(pixels),
        image_bytes=len(content),
        finished_at=NOW,
        source_file="t.csv",
        source_row=number,
        fingerprint="f",
    )


def commit(out: Path, rendered: Path, rows: Sequence[ResultRow], part_size: int = 256) -> Path:
    """Write the rows as parts of OUT, with the run.json of a rendered run."""
    out.mkdir(exist_ok=True)
    shutil.copy(rendered / "run.json", out)
    for start in range(0, len(rows), part_size):
        Manifest(out, 1).commit(rows[start : start + part_size], pa.schema([]))
    return out


Change = Callable[[Path, ResultRow], ResultRow]


def change_one(rendered: Path, tmp_path: Path, change: Change) -> tuple[int, dict[str, Any]]:
    """Compare five results with the same results, of which `change` changed number 2."""
    rows = [make_row(tmp_path / "a", number, make_image(100)) for number in range(5)]
    others = [make_row(tmp_path / "b", number, make_image(100)) for number in range(5)]
    others[2] = change(tmp_path / "b", others[2])
    return diff(commit(tmp_path / "a", rendered, rows), commit(tmp_path / "b", rendered, others))


def test_three_different_images_of_ten_thousand_are_found(rendered: Path, tmp_path: Path) -> None:
    out_a, out_b = tmp_path / "a", tmp_path / "b"
    first = make_row(out_a, 0, make_image(100))
    rows = [replace(first, id=f"row-{number:06}", seed=number, source_row=number) for number in range(10_000)]
    make_row(out_b, 0, make_image(100))
    others = list(reversed(rows))  # in other parts
    expected = {17: 1, 4_000: 10, 9_999: 100}
    for number, difference in expected.items():
        changed = make_row(out_b, number, make_image(100 + difference))
        others[9_999 - number] = replace(changed, prompt=first.prompt)
    code, report = diff(commit(out_a, rendered, rows), commit(out_b, rendered, others, 300))
    assert (code, report["rows"], report["equal"], report["bytes"], report["pixels"]) == (3, 10_000, 9_997, 3, 3)
    assert [entry["id"] for entry in report["differences"]] == [f"row-{number:06}" for number in expected]
    assert [entry["largest"] for entry in report["differences"]] == list(expected.values())
    assert (report["largest"], report["psnr_min"]) == (100, 8.13)
    assert report["settings"] == {"run": {}, "columns": {}}


def test_images_with_equal_pixels_differ_in_bytes_only(rendered: Path, tmp_path: Path) -> None:
    def recompress(out: Path, row: ResultRow) -> ResultRow:
        content = b"other bytes, which are not read"
        return replace(row, sha256=hashlib.sha256(content).hexdigest(), image_bytes=len(content))

    code, report = change_one(rendered, tmp_path, recompress)
    assert (code, report["bytes"], report["pixels"], report["largest"]) == (3, 1, 0, None)
    assert report["differences"][0]["kinds"] == ["bytes"]


def test_images_without_a_hash_of_pixels_are_decoded(rendered: Path, tmp_path: Path) -> None:
    def forget(out: Path, row: ResultRow) -> ResultRow:
        return replace(make_row(out, 2, make_image(103)), pixels_sha256=None)

    code, report = change_one(rendered, tmp_path, forget)
    assert (code, report["pixels"], report["largest"]) == (3, 1, 3)


def test_it_is_unknown_whether_the_pixels_of_a_missing_image_differ(rendered: Path, tmp_path: Path) -> None:
    def lose(out: Path, row: ResultRow) -> ResultRow:
        return replace(make_row(out, 2, make_image(103), writes=False), pixels_sha256=None)

    code, report = change_one(rendered, tmp_path, lose)
    assert (code, report["bytes"], report["pixels"]) == (3, 1, 0)
    assert report["differences"][0]["kinds"] == ["bytes"]
    assert report["differences"][0]["detail"].endswith("is missing or damaged in B")


def test_images_of_other_sizes_have_no_psnr(rendered: Path, tmp_path: Path) -> None:
    code, report = change_one(rendered, tmp_path, lambda out, row: make_row(out, 2, make_image(100, (16, 32))))
    assert (code, report["pixels"], report["largest"], report["psnr_min"]) == (3, 1, None, None)
    assert "16x16 pixels in A, 32x16 in B" in report["differences"][0]["detail"]
    assert report["settings"]["columns"] == {"width": 1}


def test_a_black_placeholder_has_no_psnr(rendered: Path, tmp_path: Path) -> None:
    def flag(out: Path, row: ResultRow) -> ResultRow:
        return replace(make_row(out, 2, make_image(0)), status="flagged", error="unsafe")

    code, report = change_one(rendered, tmp_path, flag)
    assert (code, report["status"], report["pixels"], report["largest"]) == (3, 1, 1, None)
    assert "B has a black image instead of a flagged one" in report["differences"][0]["detail"]


def test_a_file_that_is_not_an_image_is_reported(rendered: Path, tmp_path: Path) -> None:
    def spoil(out: Path, row: ResultRow) -> ResultRow:
        path, content = "images/t-00000/text.png", b"text"
        (out / path).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        return replace(row, generated_image=path, sha256=sha256, pixels_sha256="0" * 64, image_bytes=len(content))

    code, report = change_one(rendered, tmp_path, spoil)
    assert (code, report["pixels"], report["largest"]) == (3, 1, None)
    assert "its image cannot be opened" in report["differences"][0]["detail"]


@pytest.mark.parametrize(
    ("column", "value", "detail"),
    [
        ("guidance_scale", 7.2, "guidance_scale 7.1 in A, 7.2 in B"),
        ("negative_prompt", "blue", "negative_prompt None in A, 'blue' in B"),
        ("safety_scores", {"nsfw": 0.5}, "safety_scores {'nsfw': 0.25} in A, {'nsfw': 0.5} in B"),
        ("nsfw_content_detected", False, "nsfw_content_detected None in A, False in B"),
    ],
)
def test_every_column_of_the_request_is_compared(
    rendered: Path, tmp_path: Path, column: str, value: Any, detail: str
) -> None:
    code, report = change_one(rendered, tmp_path, lambda out, row: replace(row, **{column: value}))
    assert (code, report["equal"], report["settings"]["columns"]) == (3, 4, {column: 1})
    assert report["differences"][0]["kinds"] == ["settings"]
    assert detail in report["differences"][0]["detail"]


@pytest.mark.parametrize("changes", [{"seconds": 1.0, "worker": "w", "attempt": 2}, {"fingerprint": "g"}])
def test_bookkeeping_is_not_compared(rendered: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert change_one(rendered, tmp_path, lambda out, row: replace(row, **changes))[0] == 0


def test_at_most_a_thousand_differences_are_listed_in_table_order(rendered: Path, tmp_path: Path) -> None:
    first = make_row(tmp_path / "a", 0, make_image(100))
    rows = [replace(first, id=f"row-{number:06}", source_row=number) for number in range(2_500)]
    others = [replace(row, seed=1) for row in rows]
    out_a, out_b = commit(tmp_path / "a", rendered, rows), commit(tmp_path / "b", rendered, others[:2_400])
    code, report = diff(out_a, out_b)
    assert (code, report["rows"], report["equal"], report["only_a"]) == (3, 2_400, 0, 100)
    assert [entry["id"] for entry in report["differences"]] == [row.id for row in rows[:1000]]
    lines = text(out_a, out_b).splitlines()
    assert lines[-1] == "and 2,480 more; --json lists more of them"
    assert sum(line.startswith("row-") for line in lines) == 20
