"""Runs of the same table in every format give the same images, errors and carried columns."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runs import QUICK, command, results, run
from tests.tables import write_bytes

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "a red circle", "seed": 7, "height": None, "guidance_scale": 7.5, "tag": "x,y"},
    {"id": "b", "prompt": 'a "blue"\nsquare', "seed": None, "height": 72, "guidance_scale": None, "tag": "é 🎨"},
    {"id": "c", "prompt": "a green star", "seed": 2**63 - 1, "height": 64, "guidance_scale": 1.0, "tag": None},
    {"id": "d", "prompt": "a red circle", "seed": -1, "height": 13, "guidance_scale": 2.5, "tag": "z"},
]
NAMES = list(ROWS[0])


def as_csv(delimiter: str = ",") -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(NAMES)
    writer.writerows(["" if value is None else value for value in row.values()] for row in ROWS)
    return stream.getvalue().encode()


def as_parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


def as_lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def as_payload() -> bytes:
    payload = {"columns": NAMES, "data": [list(row.values()) for row in ROWS], "index": list(range(len(ROWS)))}
    return json.dumps({"input_data": payload}).encode()


def as_batch() -> bytes:
    bodies = [{name: value for name, value in row.items() if name != "id"} for row in ROWS]
    lines = [{"custom_id": row["id"], "body": body} for row, body in zip(ROWS, bodies, strict=True)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


FORMATS: dict[str, Callable[[], bytes]] = {
    "t.tsv": lambda: as_csv("\t"),
    "semicolons.csv": lambda: as_csv(";"),
    "marked.csv": lambda: b"\xef\xbb\xbf" + as_csv(),
    "t.parquet": as_parquet,
    "t.jsonl": as_lines,
    "t.ndjson": as_lines,
    "list.json": lambda: json.dumps(ROWS).encode(),
    "payload.json": as_payload,
    "batch.jsonl": as_batch,
    "t.csv.gz": lambda: gzip.compress(as_csv()),
    "t.jsonl.zst": lambda: zstd(as_lines()),
    "t.parquet.gz": lambda: gzip.compress(as_parquet()),
}


def outcomes(out: Path) -> list[tuple[Any, ...]]:
    names = ("id", "image_index", "status", "seed", "height", "sha256", "prompt", "error", "tag")
    return [tuple(str(row[name] or "") for name in names) for row in results(out)]


@pytest.fixture(scope="module")
def from_csv(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("csv")
    assert run(write_bytes(folder / "t.csv", as_csv()), folder / "out").code == 3
    rows = outcomes(folder / "out")
    assert [row[2] for row in rows][-1] == "invalid"
    assert len({row[5] for row in rows}) == len(ROWS)
    return rows


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_images_of_the_csv(name: str, tmp_path: Path, from_csv: list[tuple[Any, ...]]) -> None:
    table = write_bytes(tmp_path / name, FORMATS[name]())
    assert run(table, tmp_path / "out").code == 3
    assert outcomes(tmp_path / "out") == from_csv


@pytest.mark.parametrize("name", ["t.csv.gz", "t.parquet", "t.jsonl", "payload.json"])
def test_standard_input_gives_the_images_of_the_csv(
    name: str, tmp_path: Path, from_csv: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FORMATS[name]())))
    assert command("run", "-", "--out", tmp_path / "out", *QUICK).code == 3
    assert [row[5] for row in outcomes(tmp_path / "out")] == [row[5] for row in from_csv]


def test_text_gives_the_images_of_its_lines(tmp_path: Path) -> None:
    prompts = ["a red circle", "a blue square, large", "a green star"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    with (tmp_path / "prompts.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt"], *([prompt] for prompt in prompts)])
    for suffix in ("txt", "csv"):
        assert run(tmp_path / f"prompts.{suffix}", tmp_path / suffix).code == 0
    assert [row["sha256"] for row in results(tmp_path / "txt")] == [row["sha256"] for row in results(tmp_path / "csv")]
