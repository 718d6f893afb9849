"""`batch-infer retry` renders only rows with the selected statuses again."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from batch_infer.jobs import out as outdir
from batch_infer.jobs.selected_ids import select_ids
from batch_infer.models.stable_diffusion import StableDiffusion
from tests.runs import CommandResult, assert_whole, command, hashes, images, results, run, run_json
from tests.storage import fail_at
from tests.tables import write_csv, write_parquet

ROWS = [["id", "prompt"], ["a", "a red circle"], ["b", "a blue square"], ["c", "a green star"]]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", ROWS)


def retry(out: Path, *arguments: str | Path) -> CommandResult:
    return command("retry", out, *arguments)


def attempts(out: Path) -> dict[str, int]:
    return {row["id"]: row["attempt"] for row in results(out)}


def failing(prompt: str) -> Any:
    """Return a patch that makes the images of rows with this prompt NaN."""
    decode, condition = StableDiffusion.decode, StableDiffusion.condition
    seen: list[str] = []

    def record(self: StableDiffusion, requests: Any) -> Any:
        seen.extend(request.prompt for request in requests)
        return condition(self, requests)

    def spoil(self: StableDiffusion, latents: torch.Tensor) -> torch.Tensor:
        images = decode(self, latents)
        return images * float("nan") if prompt in seen else images

    return mock.patch.multiple(StableDiffusion, condition=record, decode=spoil)


@pytest.mark.promises
def test_failed_rows_are_retried_after_any_number_of_attempts(table: Path, out: Path) -> None:
    with failing("a red circle"):
        for _ in range(5):
            assert run(table, out, "--limit", "1").code == 3
    assert attempts(out) == {"a": 3}, "run gives up after three attempts"
    with failing("a red circle"):
        assert retry(out, "--status", "failed").code == 3
    assert attempts(out) == {"a": 4}
    done = retry(out, "--status", "failed", "--json")
    assert (done.code, json.loads(done.stdout)["rendered"]) == (0, 1)
    assert attempts(out) == {"a": 5}
    assert_whole(out)


def test_a_missing_image_is_rendered_again(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    before = hashes(out)
    missing = next(row["generated_image"] for row in results(out) if row["id"] == "b")
    (out / missing).unlink()
    assert json.loads(run(table, out, "--json").stdout)["rendered"] == 0, "run trusts the manifest"
    assert json.loads(retry(out, "--status", "failed", "--json").stdout)["rendered"] == 0
    done = retry(out, "--status", "missing", "--status", "failed", "--json")
    assert (done.code, json.loads(done.stdout)["rendered"]) == (0, 1)
    assert hashes(out) == before
    assert attempts(out) == {"a": 1, "b": 2, "c": 1}
    assert_whole(out)


def test_an_image_in_an_unreadable_folder_is_an_error(table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(table, out).code == 0
    (image,) = (out / row["generated_image"] for row in results(out) if row["id"] == "b")
    with monkeypatch.context() as patch:
        fail_at(patch, image.parent, errno.EACCES)
        done = retry(out, "--status", "missing")
    assert done.code == 75, done.stderr
    assert f"cannot read {image.parent}: Permission denied" in done.stderr
    done = retry(out, "--status", "missing", "--json")
    assert (done.code, json.loads(done.stdout)["rendered"]) == (0, 0)


def test_a_link_in_place_of_an_image_counts_as_missing(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    (image,) = (out / row["generated_image"] for row in results(out) if row["id"] == "b")
    before = image.read_bytes()
    image.rename(out.parent / "elsewhere.png")
    image.symlink_to(out.parent / "elsewhere.png")
    assert json.loads(retry(out, "--status", "missing", "--json").stdout)["rendered"] == 1
    assert (image.read_bytes(), image.is_symlink()) == (before, False)


def test_flagged_rows_are_rendered_again(table: Path, out: Path) -> None:
    write_csv(table, [["id", "prompt"], ["a", "a large red cross"], ["b", "a blue square"]])
    options = ("--steps", "20", "--guidance-scale", "5")
    assert run(table, out, *options).code == 0
    flagged = {row["id"] for row in results(out) if row["status"] == "flagged"}
    assert json.loads(retry(out, "--status", "flagged", "--json").stdout)["rendered"] == len(flagged) == 1
    assert attempts(out) == {"a": 2, "b": 1}


def test_an_invalid_row_is_rendered_once_its_table_is_corrected(table: Path, out: Path) -> None:
    write_csv(table, [["id", "prompt", "seed"], ["a", "", 1], ["b", "a blue square", 2]])
    assert run(table, out).code == 3
    assert retry(out, "--status", "invalid").code == 3
    assert attempts(out) == {"a": 1, "b": 1}, "rows that are still invalid get no attempt"
    write_csv(table, [["id", "prompt", "seed"], ["a", "a red circle", 1], ["b", "a blue square", 3]])
    done = retry(out, "--status", "invalid", "--json")
    report = json.loads(done.stdout)
    assert (done.code, report["rendered"], report["left"]) == (0, 1, 1), "the row that changed is left to run"
    assert run(table, out).code == 0


def test_rows_without_a_result_are_left_to_run(table: Path, out: Path) -> None:
    assert run(table, out, "--limit", "1").code == 0
    settings = run_json(out)
    settings["settings"]["table"]["limit"] = None
    (out / "run.json").write_text(json.dumps(settings))
    done = retry(out, "--status", "failed", "--status", "missing")
    assert done.code == 0
    assert done.stdout.endswith("2 left: `batch-infer run` renders them\n")


def test_all_images_of_a_formerly_invalid_row_are_rendered(table: Path, out: Path) -> None:
    header = ["id", "prompt", "num_images_per_prompt"]
    write_csv(table, [header, ["a", "", 3], ["b", "a blue square", 2]])
    assert run(table, out).code == 3
    write_csv(table, [header, ["a", "a red circle", 3], ["b", "a blue square", 3]])
    done = retry(out, "--status", "invalid", "--json")
    report = json.loads(done.stdout)
    assert (done.code, report["rendered"], report["left"]) == (0, 3, 1)


def test_rows_that_became_invalid_are_left_to_run(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    before = images(out)
    write_csv(table, [ROWS[0], ["a", ""], *ROWS[2:]])
    assert retry(out, "--status", "failed").code == 0
    assert images(out) == before


def test_fewer_tables_than_in_the_run_are_warned_about(table: Path, out: Path, tmp_path: Path) -> None:
    assert run(table, out).code == 0
    done = retry(out, write_csv(tmp_path / "some.csv", ROWS[:2]), "--status", "missing")
    assert "these tables have 1 results and those of the run had 3" in done.stderr


def test_the_status_can_come_from_the_environment(table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(table, out).code == 0
    monkeypatch.setenv("BATCH_INFER_STATUS", "failed missing")
    assert retry(out).code == 0


def test_retry_has_the_settings_of_the_run(
    table: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It uses them in any working folder, and ignores the variables that are meant for other runs."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    options = ("--scheduler", "DPMSolverMultistepScheduler:use_karras_sigmas=true", "--results", "csv", "--seed", "7")
    assert run("t.csv", Path("out"), *options).code == 0
    before, settings = hashes(out), {**run_json(out)["settings"], "out": None}
    for name in images(out):
        (out / name).unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("BATCH_INFER_STEPS", "9")
    assert retry(Path("../out"), "--status", "missing").code == 0
    assert hashes(out) == before
    assert {row["source_file"] for row in results(out)} == {"t.csv"}
    assert (out / "results.csv").is_file()
    assert {**run_json(out)["settings"], "out": None} == settings


def test_moved_tables_can_be_named(table: Path, out: Path, tmp_path: Path) -> None:
    assert run(table, out).code == 0
    before = hashes(out)
    moved = table.rename(tmp_path / "moved.csv")
    for name in images(out):
        (out / name).unlink()
    done = retry(out, "--status", "missing")
    assert done.code == 2
    assert "t.csv: no such file" in done.stderr
    assert retry(out, moved, "--status", "missing").code == 0
    assert hashes(out) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give --status, --id or --ids to select the rows to render"),
        (("--ids", ""), "--ids is empty: name a file or URL"),
        (("--status", "ok"), "'ok' is not one of"),
        (("--status", "failed"), "contains no run: it has no run.json"),
    ],
)
def test_retry_refuses_what_it_cannot_repeat(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = retry(tmp_path / "nothing", *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert not (tmp_path / "nothing").exists()


def test_a_run_json_without_settings_is_named(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    (out / "run.json").write_text(json.dumps({"identity": {}, "batch_infer": "9.9", "settings": {"x": 1}}))
    done = retry(out, "--status", "failed")
    assert done.code == 2
    assert "run.json is damaged or was edited: settings: Object missing required field `table`" in done.stderr


# Ids


def lose(out: Path, name: str) -> None:
    """Remove the image of a row."""
    (image,) = (out / row["generated_image"] for row in results(out) if row["id"] == name)
    image.unlink()


def rendered(done: CommandResult) -> int:
    assert done.code == 0, done.stderr
    return int(json.loads(done.stdout)["rendered"])


def test_rows_with_an_id_are_rendered_again_whatever_their_status(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    before = hashes(out)
    assert rendered(retry(out, "--id", "a", "--id", "c", "--json")) == 2
    assert attempts(out) == {"a": 2, "b": 1, "c": 2}
    assert hashes(out) == before
    assert_whole(out)


def test_the_reasons_of_a_retry_are_logged(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    assert "1 to render: 1 selected by id;" in retry(out, "--id", "a").stderr
    lose(out, "b")
    assert "1 to render: 1 missing or damaged;" in retry(out, "--status", "missing").stderr
    lose(out, "b")
    record = run_json(out)
    del record["summary"]  # as after a kill
    (out / "run.json").write_text(json.dumps(record))
    assert "2 to render: 1 selected by id, 1 missing or damaged;" in retry(out, "--id", "a").stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ids.txt", "a\n\nc\n"),
        ("ids.csv", 'id,image_index,rating,mark,status,seed,prompt\nc,0,5,x,ok,1,"a, b"\na,,1,,ok,2,x\n'),
        ("ids.csv", "\ufeffid,image_index\nc,0\na,0\n"),
        ("ids.jsonl", '{"id": "a", "note": 1}\n{"id": "c", "image_index": 0}\n'),
        ("ids.csv.gz", None),
    ],
)
def test_ids_come_from_a_file_of_any_format(table: Path, out: Path, name: str, content: str | None) -> None:
    assert run(table, out).code == 0
    file = table.with_name(name)
    file.write_bytes(gzip.compress(b"id\na\nc\n") if content is None else content.encode())
    assert rendered(retry(out, "--ids", file, "--json")) == 2
    assert attempts(out) == {"a": 2, "b": 1, "c": 2}


def test_ids_that_are_numbers_in_a_file_match_texts(out: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["id", "prompt"], ["7", "a red circle"], ["8", "a blue square"]])
    assert run(table, out).code == 0
    file = write_parquet(tmp_path / "ids.parquet", id=[7.0, None], image_index=[0, None])
    done = retry(out, "--ids", file)
    assert (done.code, "the id is empty" in done.stderr) == (2, True)
    file = write_parquet(tmp_path / "ids.parquet", id=[7.0], image_index=[0])
    assert rendered(retry(out, "--ids", file, "--json")) == 1
    assert attempts(out) == {"7": 2, "8": 1}


def test_an_image_index_selects_one_image(table: Path, out: Path) -> None:
    assert run(table, out, "--images-per-prompt", "3").code == 0
    file = write_csv(table.with_name("ids.csv"), [["id", "image_index"], ["a", "1"], ["b", ""], ["c", "2"], ["c", "0"]])
    assert rendered(retry(out, "--ids", file, "--json")) == 6
    again = {(row["id"], row["image_index"]) for row in results(out) if row["attempt"] == 2}
    assert again == {("a", 1), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 2)}
    assert_whole(out)


def test_a_status_and_ids_must_both_match(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    for row in results(out)[:2]:
        (out / row["generated_image"]).unlink()
    assert rendered(retry(out, "--status", "missing", "--id", "b", "--id", "c", "--json")) == 1
    assert attempts(out) == {"a": 1, "b": 2, "c": 1}


def test_unknown_ids_are_refused_before_anything_is_rendered(table: Path, out: Path) -> None:
    assert run(table, out, "--limit", "2").code == 0
    done = retry(out, "--id", "a", "--id", "x", "--id", "c")
    assert (done.code, done.stdout) == (2, "")
    assert f"{out} has no result with the ids 'c' and 'x'" in done.stderr
    file = write_csv(table.with_name("ids.csv"), [["id", "image_index"], ["a", "0"], ["b", "1"]])
    assert "has no result with the id 'b' (image 1)" in retry(out, "--ids", file).stderr
    many = write_csv(table.with_name("many.csv"), [["id"], *([f"x{number}"] for number in range(1000))])
    assert "995 more: check the ids" in retry(out, "--ids", many).stderr
    write_csv(table, [ROWS[0], ROWS[2]])
    assert "the tables of the run have no row with the id 'a'" in retry(out, "--id", "a").stderr
    assert attempts(out) == {"a": 1, "b": 1}


def test_a_retry_that_is_refused_changes_nothing(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert retry(out, "--id", "x").code == 2
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    with outdir.locked(out):
        done = retry(out, "--id", "x")
    assert (done.code, "is locked" in done.stderr) == (75, True), "the manifest is not read without the lock"


def test_rows_with_an_id_are_found_in_a_table_on_standard_input(
    table: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(table, out).code == 0
    with table.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        done = retry(out, "-", "--id", "b", "--json")
    assert rendered(done) == 1
    assert attempts(out) == {"a": 1, "b": 2, "c": 1}


def test_a_lost_image_with_a_selected_id_is_in_the_tables(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    record = run_json(out)
    del record["summary"]  # as after a kill
    (out / "run.json").write_text(json.dumps(record))
    lose(out, "b")
    assert rendered(retry(out, "--id", "b", "--json")) == 1


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([["name"], ["a"]], "has no column 'id'; its columns are 'name'"),
        ([["id", "image_index"], ["a", "x"]], "image_index 'x' is not a whole number"),
        ([["id", "image_index"], ["", "1"]], "the id is empty"),
        ([["id", "image_index"]], "ids.csv has no ids, so no rows are selected"),
    ],
)
def test_files_without_ids_are_refused(table: Path, out: Path, rows: list[list[str]], sentence: str) -> None:
    assert run(table, out).code == 0
    done = retry(out, "--ids", write_csv(table.with_name("ids.csv"), rows))
    assert (done.code, sentence in done.stderr) == (2, True), done.stderr


def test_a_file_of_ids_that_does_not_exist_is_refused(table: Path, out: Path) -> None:
    assert run(table, out).code == 0
    assert "no such file" in retry(out, "--ids", "nothing.csv").stderr


def test_an_id_of_a_formerly_invalid_row_selects_all_its_images(table: Path, out: Path) -> None:
    header = ["id", "prompt", "num_images_per_prompt"]
    write_csv(table, [header, ["a", "", 3], ["b", "", 3]])
    assert run(table, out).code == 3
    write_csv(table, [header, ["a", "a red circle", 3], ["b", "a red circle", 3]])
    done = retry(out, "--id", "a", "--json")
    assert rendered(done) == 3
    assert json.loads(done.stdout)["left"] == 3, "the other row is left to run"


def test_the_result_of_a_formerly_invalid_row_stands_for_all_its_images(table: Path, out: Path) -> None:
    """A file that lists results has one key of such a row: its id and image 0."""
    header = ["id", "prompt", "num_images_per_prompt"]
    write_csv(table, [header, ["a", "a red circle", 2], ["b", "a blue square", 1]])
    assert run(table, out).code == 0
    write_csv(table, [header, ["a", "", 2], ["b", "a blue square", 1]])
    assert run(table, out).code == 3
    write_csv(table, [header, ["a", "a green star", 3], ["b", "a blue square", 1]])
    file = write_csv(table.with_name("ids.csv"), [["id", "image_index"], ["a", "0"], ["b", "0"]])
    done = retry(out, "--ids", file, "--status", "invalid", "--json")
    assert (rendered(done), json.loads(done.stdout)["left"]) == (3, 0)
    assert {(row["id"], row["prompt"]) for row in results(out)} == {("a", "a green star"), ("b", "a blue square")}


def test_many_ids_are_looked_up_quickly(tmp_path: Path) -> None:
    """Each lookup takes one query of an index, not a pass over all ids."""
    file = write_csv(tmp_path / "ids.csv", [["id"], *([f"row {number}"] for number in range(100_000))])
    with select_ids(("x",), str(file)) as ids:
        assert ids is not None
        assert all(ids.match((f"row {number}", number % 3)) for number in range(0, 100_000, 10))
        assert not any(ids.match((f"none {number}", 0)) for number in range(10_000))
        select = "SELECT 1 FROM keys WHERE id = ? AND image_index IN (?, -1)"
        plan = ids._database.execute(f"EXPLAIN QUERY PLAN {select}", ("", 0)).fetchall()
        assert "SEARCH keys USING PRIMARY KEY" in str(plan)


def test_results_in_shards_are_rendered_again_by_id(table: Path, out: Path) -> None:
    assert run(table, out, "--sink", "webdataset").code == 0
    assert rendered(retry(out, "--id", "b", "--json")) == 1
    assert json.loads(command("verify", out, "--json").stdout)["problems"] == []
    assert attempts(out) == {"a": 1, "b": 2, "c": 1}
