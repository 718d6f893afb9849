"""Merging: results.* contain the committed results of current rows in the order of the tables."""

from __future__ import annotations

import base64
import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_infer.jobs import merge as merging
from batch_infer.jobs import out as outdir
from batch_infer.jobs.checksums import find_results
from batch_infer.jobs.results import remove_other_results
from batch_infer.jobs.summary import Counts
from batch_infer.manifest import SCHEMA, Manifest
from batch_infer.records import PromptRequest, ResultRow, SamplingParams, Source, utc_now
from batch_infer.settings import OutputSettings
from batch_infer.store import LocalStore
from tests.runs import CommandResult, command, results, run
from tests.tables import write_csv

NONE = pa.schema([])


def request(name: str, index: int = 0, *, row: int = 0, fingerprint: str = "f", **carried: Any) -> PromptRequest:
    params = SamplingParams(64, 64, 2, 5.0, 0.0)
    return PromptRequest(name, index, "x", None, 1, params, Source("t.csv", row), fingerprint, carried)


def result(name: str, index: int = 0, **values: Any) -> ResultRow:
    usual = {
        **{"prompt": "x", "status": "ok", "generated_image": f"images/{name}-{index}.png", "fingerprint": "f"},
        **{"finished_at": utc_now(), "source_file": "before.csv", "source_row": 99, "worker": "w"},
    }
    return ResultRow(**{"id": name, "image_index": index, **usual, **values})


def merge(
    out: Path, items: Sequence[PromptRequest | ResultRow], carried: pa.Schema = NONE, **output: Any
) -> tuple[Counts, pa.Table]:
    with Manifest(out).index() as index:
        counts = merging.merge(items, index, carried, LocalStore(out), OutputSettings(**output))
    return counts, pq.read_table(out / "results.parquet")


def without_details(counts: Counts) -> Counts:
    """Return only the numbers of rows, images and results."""
    return msgspec.structs.replace(counts, bad_results=[], reasons=[], folders={})


def csv_rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def json_rows(out: Path) -> list[dict[str, Any]]:
    def refuse(text: str) -> None:
        pytest.fail(f"{text} is not valid JSON")

    lines = (out / "results.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_results_have_the_order_of_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of commits and the size of merge batches do not matter."""
    monkeypatch.setattr(merging, "BATCH", 4)
    names = [f"{i}" for i in range(23)]
    for part in (names[::3], names[1::3], names[2::3][::-1]):
        Manifest(tmp_path).commit([result(name) for name in part], NONE)
    counts, table = merge(tmp_path, [request(name, row=i) for i, name in enumerate(names)])
    assert table["id"].to_pylist() == names
    assert table["source_row"].to_pylist() == list(range(23))
    assert without_details(counts) == Counts(rows=23, images=23, ok=23)


def test_counts_are_by_status_and_row(tmp_path: Path) -> None:
    rows = [
        *(result("two", 0), result("two", 1), result("flagged", status="flagged"), result("later", fingerprint="old")),
        result("dropped", status="flagged", generated_image=None),
        result("failed", status="failed", generated_image=None),
        result("blocked", status="blocked", generated_image=None),
        result("invalid", status="invalid", generated_image=None, fingerprint="i"),
        result("left the table"),
    ]
    Manifest(tmp_path).commit(rows, NONE)
    names = ["flagged", "later", "dropped", "failed", "blocked", "never"]
    items: list[PromptRequest | ResultRow] = [request("two", 0), request("two", 1)]
    items += [request(name, row=number) for number, name in enumerate(names, 1)]
    items.append(replace(rows[7], source_file="t.csv", source_row=8))
    counts, table = merge(tmp_path, items)
    assert without_details(counts) == Counts(
        rows=8, images=3, ok=2, flagged=2, blocked=1, invalid=1, failed=1, remaining=2, bad_rows=2
    )
    assert table["id"].to_pylist() == ["two", "two", "flagged", "dropped", "failed", "blocked", "invalid"]


def test_a_bad_row_counts_once_however_many_batches_its_images_are_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "BATCH", 2)
    failed = (1, 6)
    rows = [result("a", index, status="failed" if index in failed else "ok") for index in range(8)]
    Manifest(tmp_path).commit([*rows, result("b", status="failed")], NONE)
    counts, _ = merge(tmp_path, [*(request("a", index) for index in range(8)), request("b", row=1)])
    assert (counts.rows, counts.failed, counts.bad_rows) == (2, 3, 2)


def test_source_and_carried_columns_are_current(tmp_path: Path) -> None:
    """A row that moved, or whose carried columns changed, keeps its image."""
    before = pa.schema([("gone", pa.string()), ("kept", pa.string())])
    Manifest(tmp_path).commit([result("a", carried={"gone": "x", "kept": "old"})], before)
    carried = pa.schema([("kept", pa.int64()), ("new", pa.list_(pa.int8()))])
    _, table = merge(tmp_path, [request("a", row=5, kept=7, new=[1])], carried)
    assert table.schema.names == [*SCHEMA.names, "kept", "new"]
    row = table.to_pylist()[0]
    assert (row["source_file"], row["source_row"], row["kept"], row["new"]) == ("t.csv", 5, 7, [1])
    assert table.schema.field("new").type == pa.list_(pa.int8())


def test_an_empty_table_gives_empty_results(tmp_path: Path) -> None:
    counts, table = merge(tmp_path, [], results=("csv", "jsonl"))
    assert (counts, len(table), table.schema.names) == (Counts(), 0, SCHEMA.names)
    assert (csv_rows(tmp_path), json_rows(tmp_path)) == ([], [])
    assert (tmp_path / "results.csv").read_text().startswith("id,image_index,prompt,")


def test_csv_and_jsonl_equal_parquet(tmp_path: Path) -> None:
    carried = pa.schema([("day", pa.date32()), ("price", pa.decimal128(5, 2)), ("tags", pa.list_(pa.string()))])
    values: dict[str, Any] = {"day": date(2026, 5, 1), "price": Decimal("1.50"), "tags": ["a", "ü"]}
    row = result(
        "ü,🎨", prompt='two\nlines, "quoted"', nsfw_content_detected=False, safety_scores={"concept_0": -0.1},
        guidance_scale=7.1, seconds=0.25, seed=2**63 - 1, error=None,
    )  # fmt: skip
    Manifest(tmp_path).commit([row], NONE)
    merge(tmp_path, [request("ü,🎨", **values)], carried, results=("csv", "jsonl", "csv"))
    (from_csv,), (from_json,) = csv_rows(tmp_path), json_rows(tmp_path)
    assert list(from_csv) == list(from_json) == [*SCHEMA.names, "day", "price", "tags"]
    assert from_csv["prompt"] == from_json["prompt"] == row.prompt
    assert (from_csv["error"], from_json["error"]) == ("", None)
    assert (from_csv["nsfw_content_detected"], from_json["nsfw_content_detected"]) == ("false", False)
    assert (from_csv["guidance_scale"], from_json["guidance_scale"]) == ("7.1", 7.1)
    assert json.loads(from_csv["safety_scores"]) == from_json["safety_scores"] == {"concept_0": -0.1}
    assert (from_csv["seed"], from_json["seed"]) == (str(2**63 - 1), 2**63 - 1)
    assert from_csv["finished_at"] == from_json["finished_at"] == row.finished_at.isoformat()
    assert (from_csv["day"], from_json["day"]) == ("2026-05-01", "2026-05-01")
    assert (from_csv["price"], from_json["price"]) == ("1.50", "1.50")
    assert json.loads(from_csv["tags"]) == from_json["tags"] == ["a", "ü"]


@pytest.mark.parametrize(
    ("kind", "value", "in_csv", "in_json"),
    [
        (pa.float64(), float("nan"), "nan", None),
        (pa.float64(), float("-inf"), "-inf", None),
        (pa.list_(pa.float64()), [1.0, float("nan")], "[1.0, null]", [1.0, None]),
        (pa.struct([("a", pa.float32())]), {"a": float("inf")}, '{"a": null}', {"a": None}),
        (pa.map_(pa.string(), pa.int8()), [("k", 1), ("k", 2)], '[["k", 1], ["k", 2]]', [["k", 1], ["k", 2]]),
        (pa.binary(), b"\xff\x00", "/wA=", "/wA="),
        (pa.list_(pa.binary()), [b"\xff"], '["/w=="]', ["/w=="]),
        (pa.duration("s"), timedelta(seconds=90), "0:01:30", "0:01:30"),
        (pa.string(), "", "", ""),
        (pa.bool_(), True, "true", True),
        (pa.null(), None, "", None),
    ],
    ids=str,
)
def test_carried_values_of_any_type(tmp_path: Path, kind: pa.DataType, value: Any, in_csv: str, in_json: Any) -> None:
    """JSON has no NaN: a strict reader would refuse the file."""
    Manifest(tmp_path).commit([result("a")], NONE)
    merge(tmp_path, [request("a", mine=value)], pa.schema([("mine", kind)]), results=("csv", "jsonl"))
    assert csv_rows(tmp_path)[0]["mine"] == in_csv
    assert json_rows(tmp_path)[0]["mine"] == in_json


def test_base64_contains_the_image_file(tmp_path: Path) -> None:
    """A missing or deleted image is null and does not affect other rows."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a-0.png").write_bytes(b"\x89PNG")
    rows = [result("a"), result("dropped", generated_image=None, status="flagged"), result("deleted")]
    Manifest(tmp_path).commit(rows, NONE)
    names = [row.id for row in rows]
    _, table = merge(tmp_path, [request(name) for name in names], results=("csv", "jsonl"), base64=True)
    encoded = base64.b64encode(b"\x89PNG").decode()
    assert [row["generated_image"] for row in csv_rows(tmp_path)] == [encoded, "", ""]
    assert [row["generated_image"] for row in json_rows(tmp_path)] == [encoded, None, None]
    assert table["generated_image"].to_pylist() == ["images/a-0.png", None, "images/deleted-0.png"], "Parquet has paths"


def test_formats_no_longer_requested_are_removed(tmp_path: Path) -> None:
    """They would become stale."""
    merge(tmp_path, [], results=("csv", "jsonl"))
    merge(tmp_path, [], results=("jsonl",))
    store = LocalStore(tmp_path)
    remove_other_results(store, find_results(store), OutputSettings(results=("jsonl",)))
    assert sorted(path.name for path in tmp_path.glob("results.*")) == ["results.jsonl", "results.parquet"]


def test_an_interrupted_merge_keeps_the_old_results(tmp_path: Path) -> None:
    Manifest(tmp_path).commit([result("a")], NONE)
    merge(tmp_path, [request("a")], results=("csv",))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}

    def items() -> Any:
        yield request("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path, items(), results=("csv",))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


# Without a run


PLACES = [("b.csv", 1), ("a.csv", 10), ("a.csv", 9), ("b.csv", 0)]


def commit(out: Path, name: str, source_file: str, source_row: int, **more: Any) -> None:
    carried = pa.schema([("n", pa.int64())]) if "n" in more.get("carried", {}) else NONE
    Manifest(out).commit([result(name, source_file=source_file, source_row=source_row, **more)], carried)


def merge_parts(out: Path, tables: list[str], **output: Any) -> tuple[Counts, pa.Table]:
    counts = merging.merge_parts(LocalStore(out), tables, OutputSettings(**output))
    return counts, pq.read_table(out / "results.parquet")


@pytest.mark.parametrize(
    ("tables", "order"),
    [([], ["2", "1", "3", "0"]), (["b.csv", "a.csv"], ["3", "0", "2", "1"]), (["b.csv"], ["3", "0", "2", "1"])],
)
def test_merging_parts_alone_keeps_the_order_of_rows(tmp_path: Path, tables: list[str], order: list[str]) -> None:
    for name, place in enumerate(PLACES):
        commit(tmp_path, str(name), *place)
    counts, table = merge_parts(tmp_path, tables)
    assert table["id"].to_pylist() == order
    assert (counts.rows, counts.images, counts.ok) == (4, 4, 4)


def test_merging_parts_alone_takes_the_highest_attempt(tmp_path: Path) -> None:
    commit(tmp_path, "a", "t.csv", 0, status="failed", error="x", attempt=1, generated_image=None)
    commit(tmp_path, "a", "t.csv", 0, attempt=2)
    commit(tmp_path, "b", "t.csv", 1, status="invalid", error="x", generated_image=None)
    Manifest(tmp_path).commit([result("c", k, source_file="t.csv", source_row=2) for k in range(3)], NONE)
    counts, table = merge_parts(tmp_path, ["t.csv"])
    assert table["status"].to_pylist() == ["ok", "invalid", "ok", "ok", "ok"]
    assert without_details(counts) == Counts(rows=3, images=4, ok=4, invalid=1, bad_rows=1)


def test_carried_columns_of_parts_are_combined(tmp_path: Path) -> None:
    """Parts of one OUT may have different carried columns, and the types of a column may differ."""
    commit(tmp_path, "a", "a.csv", 0, carried={"n": 7})
    text = pa.schema([("n", pa.string()), ("tags", pa.list_(pa.string()))])
    Manifest(tmp_path).commit([result("b", source_file="b.csv", source_row=0, carried={"n": "x", "tags": ["u"]})], text)
    commit(tmp_path, "c", "c.csv", 0)
    _, table = merge_parts(tmp_path, [], results=("csv",))
    assert table.select(["n", "tags"]).to_pylist() == [
        {"n": "7", "tags": None},
        {"n": "x", "tags": ["u"]},
        {"n": None, "tags": None},
    ]
    assert [row["n"] for row in csv_rows(tmp_path)] == ["7", "x", ""]


def test_merge_works_without_run_json(tmp_path: Path) -> None:
    commit(tmp_path, "a", "t.csv", 0)
    done = command("merge", tmp_path, "--results", "jsonl", "--json")
    assert (done.code, json.loads(done.stdout)["ok"]) == (0, 1)
    assert [row["id"] for row in json_rows(tmp_path)] == ["a"]
    assert command("merge", tmp_path, "-q") == CommandResult(0, "", "")
    refused = command("merge", tmp_path, "--base64")
    assert refused.code == 2
    assert "add --results csv or --results jsonl" in refused.stderr


def test_a_merge_without_a_run_removes_nothing(tmp_path: Path) -> None:
    commit(tmp_path, "a", "t.csv", 0)
    (tmp_path / "results.csv").write_text("somebody's")
    assert command("merge", tmp_path).code == 0
    assert command("merge", tmp_path).code == 0
    assert (tmp_path / "results.csv").read_text() == "somebody's"


def test_nothing_to_merge_is_a_usage_error(tmp_path: Path) -> None:
    done = command("merge", tmp_path / "nowhere")
    assert (done.code, done.stdout) == (2, "")
    assert "nothing to merge" in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_merge_follows_the_tables_of_the_run(tmp_path: Path) -> None:
    """`merge` writes the same results as `run`, or all results in the manifest if the tables are missing."""
    table, out = tmp_path / "t.csv", tmp_path / "out"
    write_csv(table, [["id", "prompt"], ["a", "a red circle"], ["b", "a blue square"]])
    assert run(table, out, "--results", "csv").code == 0
    before = results(out)
    for name in ("results.parquet", "results.csv"):
        (out / name).unlink()
    assert command("merge", out).code == 0
    assert results(out) == before
    assert len(csv_rows(out)) == 2, "merge writes the formats of the run"
    assert command("merge", out, "--results", "jsonl").code == 0
    assert len(csv_rows(out)) == len(json_rows(out)) == 2, "merge also writes the requested formats"
    assert command("merge", out, "--base64").code == 0, "a format of the run supports base64"
    write_csv(table, [["id", "prompt", "n"], ["b", "a blue square", 5], ["c", "a star", 6]])
    done = command("merge", out)
    assert "1 left: run again to continue" in done.stdout
    assert [(row["id"], row["n"]) for row in results(out)] == [("b", "5")]
    table.unlink()
    done = command("merge", out)
    assert done.code == 0
    assert "cannot be read, so all results in the manifest are merged" in done.stderr
    assert results(out) == before


@pytest.mark.parametrize("ended", [True, False])
def test_status_agrees_with_results(tmp_path: Path, ended: bool) -> None:
    """The tables may have changed or be missing, and the run may have finished or been killed."""
    table, out = tmp_path / "t.csv", tmp_path / "out"
    write_csv(table, [["id", "prompt"], ["a", "a red circle"], ["b", "a blue square"], ["c", ""]])
    assert run(table, out).code == 3
    if not ended:
        record = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps({**record, "summary": None, "finished_at": None}))

    def report() -> tuple[dict[str, int], int, str]:
        status = json.loads(command("status", out, "--json").stdout)
        return status["counts"], status["left"], status["state"]

    def merged() -> tuple[dict[str, int], int, str]:
        counts = json.loads(command("merge", out, "--json").stdout)
        assert {row["status"] for row in results(out)} == {name for name in report()[0] if counts[name]}
        return {name: counts[name] for name in report()[0]}, counts["left"], "stopped" if counts["left"] else "finished"

    assert merged() == report()
    write_csv(table, [["id", "prompt"], ["a", "a red circle"], ["b", "a green square"], ["d", "a star"]])
    assert merged() == report()
    assert report()[1:] == (2, "stopped")
    table.unlink()
    assert merged() == report()
    assert report()[1:] == (0, "finished")
    (record_after,) = [json.loads((out / "run.json").read_text())]
    assert (record_after["summary"] is not None) == ended, "the next run must still recover a killed run"


def test_a_damaged_part_of_an_endpoint_is_named_with_a_remedy(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(Path(__file__).parent / "data" / "earlier_version" / "endpoint", out)
    before = json.loads(command("status", out, "--json").stdout)["counts"]
    assert command("merge", out).code == 0
    assert json.loads(command("status", out, "--json").stdout)["counts"] == before
    (part,) = (out / "manifest").glob("part-*")
    part.write_bytes(part.read_bytes()[:-9])
    done = command("merge", out)
    assert done.code == 2
    assert f"{part} is damaged (" in done.stderr
    assert "send its tables to the endpoint again" in done.stderr and "run again" not in done.stderr


def test_a_locked_folder_is_not_merged(tmp_path: Path) -> None:
    commit(tmp_path, "a", "t.csv", 0)
    with outdir.locked(tmp_path):
        done = command("merge", tmp_path)
    assert done.code == 75
    assert "is locked by another command" in done.stderr
