"""A run with nothing to do does not read the rows of its tables, and notices every change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest

from batch_infer.table import RowRules, Tables
from tests.runs import CommandResult, command, results, run
from tests.tables import write_csv

pytestmark = pytest.mark.usefixtures("probe_here")
ROWS = [["prompt", "topic"], ["a red circle", "x"], ["a green star", "y"], ["a blue square", "z"]]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", ROWS)


def run_and_count(table: Path, out: Path, *options: str) -> tuple[CommandResult, int]:
    """Run, and return how many times the rows of the tables were read."""
    with mock.patch.object(Tables, "compare_rows", autospec=True, side_effect=Tables.compare_rows) as reads:
        return run(table, out, *options), reads.call_count


def test_nothing_is_read_and_nothing_changes(table: Path, out: Path) -> None:
    first, reads = run_and_count(table, out, "--json")
    assert (first.code, reads > 0) == (0, True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".json"}
    again, reads = run_and_count(table, out, "--json")
    assert (again.code, reads) == (0, 0)
    counts = ("rows", "images", "ok", "flagged", "blocked", "invalid", "failed", "left", "bad_rows", "bad_results")
    summaries = [json.loads(result.stdout) for result in (first, again)]
    assert {name: summaries[0][name] for name in counts} == {name: summaries[1][name] for name in counts}
    assert (summaries[1]["rendered"], summaries[1]["undone"]) == (0, 0)
    changed = [path for path, content in before.items() if path.read_bytes() != content and "logs" not in path.parts]
    assert changed == []
    record = json.loads((out / "run.json").read_text())
    assert (record["run_number"], record["survey"]["total"], record["survey"]["standing"]) == (
        2,
        3,
        {"ok": 2, "flagged": 1},
    )
    assert "nothing to render" in run(table, out).stdout
    assert command("status", out).stdout.splitlines()[1].startswith("3 rows · 2 ok")


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "a new row": lambda table, _: write_csv(table, [*ROWS, ["a red ring", "w"]]),
    "a carried cell": lambda table, _: write_csv(table, [*ROWS[:-1], ["a blue square", "new"]]),
    "no results": lambda _, out: (out / "results.parquet").unlink(),
    "edited results": lambda _, out: _append(out / "results.parquet"),
    "no part": lambda _, out: next((out / "manifest").glob("part-*")).unlink(),
    "a damaged part": lambda _, out: _append(next((out / "manifest").glob("part-*"))),
    "no checksums": lambda _, out: (out / "manifest" / "SHA256SUMS").unlink(),
    "edited checksums": lambda _, out: _append(out / "manifest" / "SHA256SUMS"),
}


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noticed(table: Path, out: Path, change: Callable[[Path, Path], object]) -> None:
    run(table, out)
    change(table, out)
    again, reads = run_and_count(table, out)
    assert (again.code, reads > 0) == (0, True), again.stderr
    rows = results(out)
    assert [row["prompt"] for row in rows] == [cells[0] for cells in _read(table)]
    assert [row["topic"] for row in rows] == [cells[1] for cells in _read(table)]
    assert run_and_count(table, out)[1] == 0


def _read(table: Path) -> list[list[str]]:
    return [line.split(",") for line in table.read_text().splitlines()[1:]]


@pytest.mark.parametrize("options", [("--results", "csv"), ("--column", "prompt=topic", "--rerender-changed")], ids=str)
def test_other_options_are_noticed(table: Path, out: Path, options: tuple[str, ...]) -> None:
    run(table, out)
    again, reads = run_and_count(table, out, *options)
    assert (again.code, reads > 0) == (0, True), again.stderr


def test_invalid_rows_are_reported_again(tmp_path: Path, out: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [*ROWS, ["", "w"]])
    for _ in range(2):
        again, reads = run_and_count(table, out)
        assert (again.code, reads > 0) == (3, True)
        assert "t.csv, line 5 (t-00000003): the prompt is empty" in again.stdout


def test_a_run_that_was_stopped_continues(table: Path, out: Path) -> None:
    run(table, out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "summary": None}))
    assert run_and_count(table, out)[1] > 0


def test_only_results_of_the_current_rows_are_merged(table: Path, out: Path) -> None:
    """Merging does not read the rows either if all runs read the same ones. Results of removed rows are left out."""
    run(table, out)
    with mock.patch.object(Tables, "compare_rows", autospec=True, side_effect=Tables.compare_rows) as reads:
        before = pq.read_table(out / "results.parquet")
        (out / "results.parquet").unlink()
        assert command("merge", out).code == 0
        assert reads.call_count == 0
        assert pq.read_table(out / "results.parquet").equals(before)
        write_csv(table, ROWS[:-1])
        assert command("merge", out).code == 0
        assert reads.call_count > 0
    assert len(results(out)) == 2
    run(table, out)
    assert len(results(out)) == 2
    merged: Any = json.loads(command("merge", out, "--json").stdout)
    assert (merged["rows"], len(results(out))) == (2, 2)


def test_a_table_replaced_while_it_is_read_is_read_again(
    table: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run read the old rows, so its record must not claim that it read the new ones."""
    compute = Tables.compute_digest

    def replace_and_compute(tables: Tables, rules: RowRules) -> str | None:
        if not replaced:
            replaced.append(write_csv(table, [*ROWS, ["a red ring", "w"]]))
        return compute(tables, rules)

    replaced: list[Path] = []
    monkeypatch.setattr(Tables, "compute_digest", replace_and_compute)
    run(table, out)
    assert replaced
    again, reads = run_and_count(table, out)
    assert (again.code, reads > 0, len(results(out))) == (0, True, 4)


def test_results_merged_from_other_tables_are_merged_again(table: Path, out: Path) -> None:
    run(table, out)
    write_csv(table, [*ROWS[:-1], ["a blue square", "new"]])
    run(table, out)
    table.rename(table.with_suffix(".away"))
    assert command("merge", out).code == 0, "all results in the manifest are merged, which has the old cells"
    assert [row["topic"] for row in results(out)] == ["x", "y", "z"]
    table.with_suffix(".away").rename(table)
    run(table, out)
    assert [row["topic"] for row in results(out)] == ["x", "y", "new"]


def test_another_format_from_merge_is_noticed(table: Path, out: Path) -> None:
    """The run removes the file, because its settings do not have it, so SHA256SUMS must lose it too."""
    run(table, out)
    assert command("merge", out, "--results", "csv").code == 0
    assert (out / "results.csv").exists()
    again, reads = run_and_count(table, out)
    assert reads > 0
    assert not (out / "results.csv").exists()
    assert f"removed results.csv from {out}: this run writes other formats (see --results)" in again.stderr
    assert command("verify", out).code == 0


def test_a_merge_of_a_stopped_run_counts_all_rows(table: Path, out: Path) -> None:
    run(table, out)
    next((out / "manifest").glob("part-*")).unlink()
    (out / "manifest" / "SHA256SUMS").unlink()
    merged: Any = json.loads(command("merge", out, "--json").stdout)
    assert (merged["rows"], merged["left"] > 0) == (3, True)


def test_notices_are_logged_again(tmp_path: Path, out: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt", "Seed"], ["a red circle", "1"]])
    assert "'Seed'" in run(table, out).stderr
    again, reads = run_and_count(table, out)
    assert (reads, "'Seed'" in again.stderr) == (0, True)


def test_the_tables_may_be_touched(table: Path, out: Path) -> None:
    run(table, out)
    os.utime(table, (1, 1))
    assert run_and_count(table, out)[1] == 0
