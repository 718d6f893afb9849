"""Manifest parts that name files outside OUT, which an attacker may have written."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
from PIL import Image

from batch_infer.sinks import make_sink
from batch_infer.worker import committing
from tests.runs import command, images, results, run
from tests.tables import write_csv

PROMPT = "a large red cross on a white ground"
"""Prompt of images that the checker flags, so that a policy would change them."""
SHARP = ("--steps", "12", "--guidance-scale", "5", "--safety", "none")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table and its OUT, whose manifest is one part. Tests must copy it."""
    folder = tmp_path_factory.mktemp("hostile")
    table = write_csv(folder / "t.csv", [["prompt"], *([PROMPT] for _ in range(9))])
    with mock.patch.object(committing, "COMMIT_SECONDS", 3600.0):
        assert run(table, folder / "out", *SHARP).code == 0
    return folder


@pytest.fixture
def folder(rendered: Path, tmp_path: Path) -> Path:
    """A copy with an image outside OUT, links to it in OUT, and a part that names all of them."""
    shutil.copytree(rendered, tmp_path / "folder")
    folder = tmp_path / "folder"
    out = folder / "out"
    (folder / "secret").mkdir()
    (first, *_) = results(out)
    for name in ("x.png", "secret/y.png"):
        shutil.copy(out / first["generated_image"], folder / name)
    inner = out / "images" / "t-00000"
    (inner / "link.png").symlink_to(folder / "x.png")
    (out / "images" / "away").symlink_to(folder / "secret")
    (out / "images" / "loop").symlink_to(out / "images" / "loop")
    os.mkfifo(inner / "pipe.png")
    name_files(
        out,
        [
            "/etc/passwd",
            "../x.png",
            "images/../../x.png",
            "images/t-00000/link.png",
            "images/away/y.png",
            "images/loop/y.png",
            "images/t-00000/pipe.png",
            "",
        ],
    )
    return folder


def name_files(out: Path, paths: list[str]) -> None:
    """Make the first rows name these files, with their checksums."""
    (part,) = (out / "manifest").glob("part-*")
    rows = pq.read_table(part)
    columns: dict[str, list[Any]] = {
        name: rows[name].to_pylist() for name in ("generated_image", "sha256", "image_bytes")
    }
    for k, path in enumerate(paths):
        target = out / path
        content = target.read_bytes() if target.is_file() else b""
        for name, value in zip(columns, (path, hashlib.sha256(content).hexdigest(), len(content)), strict=True):
            columns[name][k] = value
    for name, values in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), [values])
    pq.write_table(rows, part)


def test_merge_embeds_no_file_from_outside_out(folder: Path) -> None:
    out = folder / "out"
    (out / "manifest" / "SHA256SUMS").unlink()  # it lists the parts as they were
    done = command("merge", out, "--results", "jsonl", "--base64")
    assert done.code == 0, done.stderr
    lines = (out / "results.jsonl").read_text().splitlines()
    *others, own = (json.loads(line)["generated_image"] for line in lines)
    assert others == [None] * 8
    assert base64.b64decode(own).startswith(b"\x89PNG")
    assert done.stderr.count("or not an image of this run, so it is omitted") == 8


@pytest.mark.parametrize("policy", ["blank", "quarantine"])
def test_rescore_reads_and_replaces_no_file_outside_out(folder: Path, policy: str) -> None:
    out = folder / "out"
    before = {path: path.read_bytes() for path in (folder / "x.png", folder / "secret" / "y.png")}
    own = results(out)[-1]["generated_image"]
    done = command("rescore", out, "--safety", "checker", "--on-flagged", policy, "--json")
    assert done.code == 3, done.stderr
    assert json.loads(done.stdout)["failed"] == 8
    assert {path: path.read_bytes() for path in before} == before
    assert Path("/etc/passwd").exists()
    *others, last = results(out)
    assert {(row["status"], row["generated_image"]) for row in others} == {("failed", None)}
    assert last["status"] == "flagged"
    assert last["generated_image"].partition("/")[2] == own.partition("/")[2]
    again = run(folder / "t.csv", out, *SHARP, "--safety", "checker", "--on-flagged", policy)
    assert again.code == 0, again.stderr
    for row in results(out):
        assert make_sink(out).has(row["generated_image"])
        with Image.open(out / row["generated_image"]) as image:
            assert image.size == (64, 64)
    assert {path: path.read_bytes() for path in before} == before
    assert images(out) >= {row["generated_image"] for row in results(out)}


def test_recovery_of_a_killed_run_reads_no_file_outside_out(folder: Path) -> None:
    """Rows whose image is not a file of the run are rendered again."""
    out = folder / "out"
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "summary": None}))
    done = run(folder / "t.csv", out, *SHARP, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["rendered"] == 8
    assert all(make_sink(out).has(row["generated_image"]) for row in results(out))


@pytest.mark.parametrize(
    "path", ["images/t/\0x", "images/" + "x" * 5_000, "images/t/x/y", "images", "images/t", "", "."]
)
def test_only_regular_files_are_read(tmp_path: Path, path: str) -> None:
    (tmp_path / "images" / "t").mkdir(parents=True)
    (tmp_path / "images" / "t" / "x").write_bytes(b"x")
    assert make_sink(tmp_path).read(path) is None
    assert not make_sink(tmp_path).has(path)
    assert make_sink(tmp_path).read("images/t/x") == b"x"
    assert make_sink(tmp_path).read("images/t/x", 2) is None
