"""Ids from content: renaming, sorting, splitting or converting a table changes no ids, seeds or images."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.runs import command, hashes, images, results, run, run_json
from tests.tables import in_format, read_requests, write_bytes, write_csv, write_parquet

ROWS: list[dict[str, Any]] = [
    {"prompt": "a red circle", "height": 64, "tag": 1},
    {"prompt": "a red circle", "height": 64, "tag": 2},
    {"prompt": "a red circle", "height": 72, "tag": None},
    {"prompt": "a red circle", "height": 64, "tag": 1},
    {"prompt": "a blue square", "height": None, "tag": None},
]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read_values(*tables: Path | str, **options: Any) -> list[tuple[Any, ...]]:
    """Return the values that must not depend on the position of a row, sorted."""
    rows = read_requests(*tables, id_from="content", **options)
    return sorted((row.id, row.seed, row.prompt, row.params, str(row.carried["tag"])) for row in rows)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet", "csv.gz"])
def test_content_ids_do_not_depend_on_the_position_of_a_row(suffix: str) -> None:
    """They do not depend on the order of rows, the number of tables, or their format."""
    expected = read_values(write_bytes(Path("t.jsonl"), in_format("jsonl", ROWS)))
    assert len({row[0] for row in expected}) == len(ROWS)
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    parts = [write_bytes(Path(f"s/{n}.{suffix}"), in_format(suffix, shuffled[n::2])) for n in (0, 1)]
    rows = read_values("s")
    assert [(*row[:4], row[4].replace("None", "")) for row in rows] == [
        (*row[:4], row[4].replace("None", "")) for row in expected
    ]
    assert read_values(*reversed(parts)) == rows


def test_equal_rows_are_numbered_and_id_cells_are_kept() -> None:
    write_csv(Path("t.csv"), [["id", "prompt"], ["", "x"], ["mine", "x"], ["", "x"], ["", "y"]])
    first, mine, second, other = (row.id for row in read_requests("t.csv", id_from="content"))
    assert mine == "mine"
    assert (first[:-1], first[-2:], second) == (second[:-1], "-0", f"{first[:-1]}1")
    assert other[-2:] == "-0"
    assert len(first) == 22


def test_files_with_the_same_stem_need_no_id_column() -> None:
    for name in ("t.csv", "t.tsv"):
        write_csv(Path(name), [["prompt"], ["x"]])
    assert len({row.id for row in read_requests("t.csv", "t.tsv", id_from="content")}) == 2


def test_a_whole_number_has_the_same_id_in_any_type() -> None:
    write_parquet(Path("a/t.parquet"), prompt=["x"], n=pa.array([5]))
    write_parquet(Path("b/t.parquet"), prompt=["x"], n=pa.array([5.0]))
    (one,), (other,) = (read_requests(folder, id_from="content") for folder in "ab")
    assert one.id == other.id


def test_a_table_that_is_sorted_split_and_renamed_renders_nothing(out: Path) -> None:
    rows = [["prompt", "tag"], *([f"a {colour} circle", colour] for colour in ("red", "blue", "green", "red"))]
    table = write_csv(Path("t.csv"), rows)
    assert run(table, out, "--id-from", "content").code == 0
    before, files = hashes(out), images(out)
    table.unlink()
    write_csv(Path("s/later.csv"), [rows[0], rows[3], rows[1]])
    write_csv(Path("s/sooner.csv"), [rows[0], rows[4], rows[2]])
    done = run("s", out, "--id-from", "content", "--json")
    assert json.loads(done.stdout)["rendered"] == 0
    assert (hashes(out), images(out)) == (before, files)
    assert run_json(out)["settings"]["table"]["id_from"] == "content"
    assert [row["source_file"] for row in results(out)] == ["s/later.csv"] * 2 + ["s/sooner.csv"] * 2
    # `retry` and `merge` read the source of ids from run.json.
    (out / next(iter(files))).unlink()
    assert command("retry", out, "--status", "missing").code == 0
    assert command("merge", out).code == 0
    assert hashes(out) == before


def test_plan_names_the_source_of_ids(out: Path) -> None:
    table = write_csv(Path("t.csv"), [["prompt"], ["a red circle"]])
    assert "ids      from file name and row number" in command("plan", table, "-o", out, "--steps", "2").stdout
