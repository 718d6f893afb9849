"""Finished images are replaced only on request, and plan and run say why rows will be rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batch_infer.errors import StoppedError
from tests.runs import QUICK, assert_whole, command, hashes, results, run
from tests.tables import write_csv

pytestmark = pytest.mark.usefixtures("probe_here")

ROWS: list[list[Any]] = [
    ["id", "prompt", "num_inference_steps"],
    ["a", "a red circle", ""],
    ["b", "a green star", ""],
    ["own", "a blue square", 2],
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", ROWS)


def state(out: Path) -> dict[str, bytes]:
    """Return the content of every file in OUT except the logs."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*")
            if path.is_file() and "logs" not in path.parts and path.name != ".lock"}  # fmt: skip


def test_a_changed_default_replaces_nothing(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    before = state(out)
    write_csv(table, [*ROWS, ["new", "a red star", ""]])
    sentence = (
        f"2 finished images in {out} would be rendered again and replaced, because --steps differs from the run that "
        "made them (num_inference_steps 2 -> 3): give the same options again, or add --rerender-changed to render "
        "them again, or --overwrite to start anew"
    )
    refused = run(table, out, "--steps", "3")
    assert (refused.code, refused.stdout) == (2, "")
    assert sentence in refused.stderr
    assert state(out) == before
    planned = command("plan", table, "--out", out, "--steps", "3", "--slots", "8", "--threads", "1", "--device", "cpu",
                      "--on-flagged", "keep")  # fmt: skip
    assert planned.code == 2
    assert "3 to render: 2 changed (num_inference_steps 2 -> 3), 1 new" in planned.stdout
    assert sentence in planned.stderr
    assert state(out) == before
    done = run(table, out, "--steps", "3", "--rerender-changed")
    assert done.code == 0
    assert "3 to render: 2 changed (num_inference_steps 2 -> 3), 1 new; 1 already done" in done.stderr
    assert {row["id"]: row["num_inference_steps"] for row in results(out)} == {"a": 3, "b": 3, "own": 2, "new": 3}
    assert_whole(out)
    assert json.loads(run(table, out, "--steps", "3", "--json").stdout)["rendered"] == 0


def test_a_row_whose_own_cells_changed_is_rendered_again(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    before = hashes(out)
    write_csv(table, [*ROWS[:-1], ["own", "a blue circle", 3]])
    done = run(table, out)
    assert done.code == 0
    assert "1 to render: 1 changed; 2 already done" in done.stderr
    after = hashes(out)
    assert {key for key in before if before[key] != after[key]} == {("own", 0)}


def test_a_changed_default_that_no_finished_row_uses_is_accepted(tmp_path: Path, out: Path) -> None:
    rows: list[list[Any]] = [["id", "prompt", "num_inference_steps"], ["a", "a red circle", 2]]
    assert run(write_csv(tmp_path / "t.csv", rows), out).code == 0
    more = write_csv(tmp_path / "t.csv", [*rows, ["b", "a red star", ""]])
    assert run(more, out, "--steps", "3").code == 0
    assert [row["num_inference_steps"] for row in results(out)] == [2, 3]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--seed", "7"], "--seed differs from the run that made them (seed 0 -> 7)"),
        (["--negative-prompt", "dull"], "(negative_prompt None -> 'dull')"),
        (["--height", "72", "--width", "56"], "--height and --width differ from"),
        (["--guidance-scale", "3"], "--guidance-scale differs"),
        (["--column", "prompt=id"], "(columns as they are named -> prompt=id)"),
    ],
    ids=["seed", "negative prompt", "size", "guidance", "column"],
)
def test_every_option_that_changes_images_is_named(table: Path, out: Path, options: list[str], cause: str) -> None:
    assert run(table, out).code == 0
    before = state(out)
    done = run(table, out, *options)
    assert done.code == 2
    assert cause in done.stderr
    assert state(out) == before


def test_an_interrupted_scan_keeps_the_earlier_options(table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(table, out).code == 0
    before = state(out)

    def interrupt(*_: Any) -> None:
        raise StoppedError("stopped by SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr("batch_infer.jobs.execution.find_changes", interrupt)
        assert run(table, out, "--steps", "3").code == 75
    assert run(table, out, "--steps", "3").code == 2
    assert state(out) == before


def test_retry_renders_the_chosen_rows_despite_changed_options(
    table: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last run, with --rerender-changed, was stopped before it rendered anything."""
    assert run(table, out).code == 0
    before = hashes(out)

    def interrupt(*_: Any) -> None:
        raise StoppedError("stopped by SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr("batch_infer.jobs.execution.RunExecution._render", interrupt)
        assert run(table, out, "--steps", "3", "--rerender-changed").code == 75
    (out / next(row["generated_image"] for row in results(out) if row["id"] == "own")).unlink()
    done = command("retry", out, "--status", "missing")
    assert done.code == 0
    assert "1 to render" in done.stderr
    assert "2 left: `batch-infer run` renders them" in done.stdout
    own = ("own", 0)
    assert hashes(out) == {own: before[own]}


def test_a_default_that_makes_finished_rows_invalid_is_named(tmp_path: Path, out: Path) -> None:
    table = write_csv(
        tmp_path / "t.csv", [["id", "prompt", "seed", "num_images_per_prompt"], ["a", "x", 2**63 - 1, ""]]
    )
    assert run(table, out).code == 0
    before = state(out)
    done = run(table, out, "--images-per-prompt", "2")
    assert done.code == 2
    assert "--images-per-prompt differs" in done.stderr
    assert state(out) == before


def test_another_id_source_is_refused(tmp_path: Path, out: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])
    assert run(table, out).code == 0
    before = state(out)
    done = run(table, out, "--id-from", "content")
    assert done.code == 2
    assert "--id-from differs from the run that made them (id from row -> content)" in done.stderr
    assert state(out) == before
    assert run(table, out, "--id-from", "content", "--rerender-changed").code == 0


def test_images_of_runs_before_the_last_are_kept(table: Path, tmp_path: Path, out: Path) -> None:
    other = write_csv(tmp_path / "other.csv", [["id", "prompt"], ["other", "a red star"]])
    assert run(table, out).code == 0
    assert run(other, out, "--steps", "3").code == 0
    before = state(out)
    done = run(table, out, "--steps", "3")
    assert done.code == 2
    assert "--steps differs from the run that made them (num_inference_steps 2 -> 3)" in done.stderr
    assert state(out) == before
    assert json.loads(run(table, out, "--json").stdout)["rendered"] == 0


def test_without_run_json_no_finished_image_is_replaced(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    (out / "run.json").unlink()
    before = state(out)
    done = run(table, out, "--steps", "3")
    assert done.code == 2
    assert "2 finished images" in done.stderr and "run.json, which records the options, is missing" in done.stderr
    assert state(out) == before
    assert json.loads(run(table, out, "--json").stdout)["rendered"] == 0


def test_ids_from_content_for_a_new_file_leave_rows_with_their_own_ids(table: Path, tmp_path: Path, out: Path) -> None:
    assert run(table, out).code == 0
    plain = write_csv(tmp_path / "plain.csv", [["prompt"], ["a red star"]])
    done = command("run", table, plain, "--out", out, *QUICK, "--id-from", "content", "--json")
    assert (done.code, json.loads(done.stdout)["rendered"]) == (0, 1)
    refused = command("run", table, plain, "--out", out, *QUICK)
    assert refused.code == 2
    assert "(id from content -> row)" in refused.stderr


def test_more_images_of_each_row_are_new(table: Path, out: Path) -> None:
    assert run(table, out, "--limit", "1").code == 0
    done = run(table, out, "--limit", "1", "--images-per-prompt", "2")
    assert done.code == 0
    assert "1 to render, 1 already done" in done.stderr
