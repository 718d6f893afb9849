"""output.jsonl and error.jsonl have the format of OpenAI's Batch API, and one line for each row."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_infer.errors import SettingsError
from batch_infer.jobs import merge as merging
from batch_infer.jobs.checksums import read_checksums
from batch_infer.manifest import Manifest
from batch_infer.records import PromptRequest, ResultRow, SamplingParams, Source, utc_now
from batch_infer.settings import OutputSettings
from batch_infer.store import LocalStore
from tests.runs import command, results, run
from tests.tables import write_csv

NONE = pa.schema([])
FILES = ("output.jsonl", "error.jsonl")


def request(name: str, index: int = 0) -> PromptRequest:
    params = SamplingParams(64, 64, 2, 5.0, 0.0)
    return PromptRequest(name, index, "x", None, 1, params, Source("t.csv", 0), "f")


def commit(out: Path, name: str, index: int = 0, **values: Any) -> None:
    usual = {
        **{"prompt": "x", "status": "ok", "generated_image": f"images/{name}-{index}.png", "fingerprint": "f"},
        **{"finished_at": utc_now(), "source_file": "t.csv", "source_row": 0, "worker": "w"},
    }
    Manifest(out).commit([ResultRow(**{"id": name, "image_index": index, **usual, **values})], NONE)


def merge(out: Path, items: Sequence[PromptRequest]) -> list[list[dict[str, Any]]]:
    """Merge, and return the lines of both files."""
    with Manifest(out).index() as index:
        merging.merge(items, index, NONE, LocalStore(out), OutputSettings(results=("openai",)))
    return read(out)


def read(out: Path) -> list[list[dict[str, Any]]]:
    return [[json.loads(line) for line in (out / name).read_text("utf-8").splitlines()] for name in FILES]


def write_batch(path: Path, requests: Sequence[dict[str, Any]]) -> Path:
    lines = [
        {"custom_id": f"row {k}", "method": "POST", "url": "/v1/images/generations", "body": body}
        for k, body in enumerate(requests)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_a_batch_file_becomes_the_files_of_the_batch_api(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [
        {"model": "m", "prompt": "a red circle", "n": 2, "size": "64x64"},
        {"prompt": "a blue square", "size": "63x64"},
        {"prompt": "a small grüner\u2028star"},
    ]
    out = tmp_path / "out"
    done = run(write_batch(tmp_path / "t.jsonl", bodies), out, "--results", "openai", "--safety", "none")
    assert done.code == 3 and f"{out}/results.parquet, {out}/output.jsonl, {out}/error.jsonl" in done.stdout
    output, errors = read(out)
    assert [line["custom_id"] for line in output] == ["row 0", "row 2"]
    for line in output:
        assert line.keys() == {"id", "custom_id", "response", "error"} and line["error"] is None
        assert line["id"].startswith("batch_req_") and line["response"]["status_code"] == 200
        assert line["response"]["body"].keys() == {"created", "data"} and line["response"]["request_id"]
    paths = [row["generated_image"] for row in results(out) if row["id"] == "row 0"]
    assert output[0]["response"]["body"]["data"] == [{"url": path} for path in paths] and len(paths) == 2
    assert (out / paths[0]).is_file()
    finished = max(row["finished_at"] for row in results(out) if row["id"] == "row 0")
    assert output[0]["response"]["body"]["created"] == int(finished.timestamp())
    (line,) = errors
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("row 1", None, 400)
    assert line["response"]["body"]["error"] == {
        "code": "invalid_value",
        "message": "width 63 is not a multiple of 8; the nearest is 64",
        "param": None,
        "type": "invalid_request_error",
    }
    assert len({line["id"] for line in (*output, *errors)}) == 3
    before = [(out / name).read_bytes() for name in FILES]
    assert command("merge", out).code == 0
    assert [(out / name).read_bytes() for name in FILES] == before
    done = command("merge", out, "--base64")
    assert done.code == 0
    data = read(out)[0][0]["response"]["body"]["data"]
    assert [base64.b64decode(image["b64_json"]) for image in data] == [(out / path).read_bytes() for path in paths]
    assert read(out)[1] == errors


def test_statuses_have_the_errors_of_the_api(tmp_path: Path) -> None:
    """A row with one bad image is an error, because the API returns all images of a request or none."""
    commit(tmp_path, "blocked", status="blocked", error="refused", generated_image=None)
    commit(tmp_path, "failed", status="failed", error="out of memory", generated_image=None)
    commit(tmp_path, "flagged", 0)
    commit(tmp_path, "flagged", 1, status="flagged", error="unsafe")
    items = [request("blocked"), request("failed"), request("flagged"), request("flagged", 1)]
    output, errors = merge(tmp_path, items)
    assert output == []
    blocked, failed, flagged = errors
    assert blocked["response"]["body"]["error"]["code"] == "content_policy_violation"
    assert blocked["response"]["body"]["error"]["message"] == "refused"
    assert failed["response"] is None
    assert failed["error"] == {"code": "server_error", "message": "out of memory"}
    assert flagged["response"]["body"]["error"]["code"] == "content_policy_violation"
    assert flagged["response"]["body"]["error"]["message"] == "image 1: unsafe"


def test_a_row_that_lacks_images_is_no_success(tmp_path: Path) -> None:
    for name, index in [("last", 0), ("first", 1), ("whole", 0), ("whole", 1)]:
        commit(tmp_path, name, index)
    items = [request(name, index) for name in ("last", "first", "none", "whole") for index in range(2)]
    output, errors = merge(tmp_path, items)
    assert [line["custom_id"] for line in output] == ["whole"]
    assert [(line["custom_id"], line["error"]["code"]) for line in errors] == [
        ("last", "batch_expired"),
        ("first", "batch_expired"),
    ]


def test_a_row_may_be_in_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "BATCH", 2)
    items = [request(name, index) for name in ("a", "b", "c") for index in range(3)]
    for item in items[:-1]:
        commit(tmp_path, item.id, item.image_index)
    output, errors = merge(tmp_path, items)
    for line in output:
        name = line["custom_id"]
        urls = [{"url": f"images/{name}-{index}.png"} for index in range(3)]
        assert line["response"]["body"]["data"] == urls
    assert [line["custom_id"] for line in output] == ["a", "b"]
    assert [line["custom_id"] for line in errors] == ["c"]


def test_a_missing_image_is_an_error_and_the_other_rows_are_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"], ["a blue square"]])
    assert run(table, out, "--results", "openai", "--base64", "--safety", "none").code == 0
    (out / "images/t-00000/t-00000000-0.png").unlink()
    assert command("merge", out).code == 0
    (output,), (error,) = read(out)
    assert (output["custom_id"], error["custom_id"]) == ("t-00000001", "t-00000000")
    assert error["error"] == {"code": "server_error", "message": "the file of image 0 is missing"}


def test_the_checksums_cover_both_files_and_they_are_removed_with_their_format(tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])
    assert run(table, out, "--results", "openai", "--results", "csv").code == 0
    assert {*FILES, "results.csv", "results.parquet"} <= read_checksums(LocalStore(out)).keys()
    assert command("verify", out).code == 0
    with (out / "output.jsonl").open("a") as stream:
        stream.write("{}\n")
    done = command("verify", out, "--json")
    (problem,) = json.loads(done.stdout)["problems"]
    assert (done.code, problem["kind"], problem["path"]) == (3, "results_differ", "output.jsonl")
    assert command("merge", out).code == command("verify", out).code == 0
    assert run(table, out, "--results", "csv").code == 0
    assert not any((out / name).exists() for name in FILES)
    assert (out / "results.csv").exists() and command("verify", out).code == 0


def test_files_of_other_programs_with_these_names_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    table, other = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]]), out / "error.jsonl"
    other.write_text("mine")
    done = run(table, out, "--results", "openai")
    assert done.code == 2 and f"{other} is not listed in manifest/SHA256SUMS" in done.stderr
    assert run(table, out).code == 0
    assert command("merge", out, "--results", "openai").code == 2
    assert run(table, out, "--overwrite").code == 0
    assert command("verify", out).code == 0
    assert other.read_text() == "mine"


def test_overwrite_removes_both_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])
    assert run(table, out, "--results", "openai").code == 0
    assert run(table, out, "--overwrite").code == 0
    assert not any((out / name).exists() for name in FILES)


def test_base64_needs_a_format_with_text() -> None:
    OutputSettings(results=("openai",), base64=True)
    with pytest.raises(SettingsError, match="--results openai"):
        OutputSettings(results=("parquet",), base64=True)
