"""`--time-limit`: a run stops in time and says so, and the next run continues."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from batch_infer import stopping
from batch_infer.cli.values import parse_duration
from batch_infer.jobs.merge import merge_tables
from batch_infer.jobs.plan import Plan, SizePlan
from batch_infer.jobs.summary import Counts
from batch_infer.records import utc_now
from tests.runs import QUICK, assert_whole, command, hashes, results, run
from tests.tables import write_csv

ROWS = 24
LINE = "batch-infer: the time limit of 20.0 s was reached, and {} left: run the same command again to continue"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", [["prompt"], *(["a red circle"] for _ in range(ROWS))])


@pytest.fixture
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a clock that advances by a second whenever it is read."""
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=itertools.count().__next__))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1d", 86400), ("90", 90), ("0.5", 0.5), (" 2h ", 7200),
     ("1.5h", 5400), ("1d2h3m4s", 93784), ("1h 30m", 5400), ("2d12h", 216000), (45, 45)],
)  # fmt: skip
def test_durations_are_parsed(text: Any, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "0", "0s", "-1", "-5m", "1x", "m", "h1", "30m1h", "1h1h", "1e3", "inf", "nan", "1,5h", "5 minutes", "٣h"],
)
def test_invalid_durations_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a duration \\(examples: 90s, 30m, 2h"):
        parse_duration(text)


def test_invalid_duration_ends_with_2(table: Path, tmp_path: Path) -> None:
    done = run(table, tmp_path / "out", "--time-limit", "soon")
    assert (done.code, done.stdout) == (2, "")
    assert "'soon' is not a duration" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_ticking")
def test_stopped_run_is_continued_by_the_next(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--slots", "2", "--num-processes", "0", "--no-progress")
    stopped = run(table, out, *options, "--time-limit", "20")
    assert stopped.code == 75
    done = len(results(out))
    assert 0 < done < ROWS, "finished rows are kept and merged"
    assert_whole(out)
    assert stopped.stderr.splitlines()[-1] == LINE.format(f"{ROWS - done} images are")
    assert (
        stopped.stdout.splitlines()[-1] == f"stopped early: {ROWS - done} left; run the same command again to continue"
    )
    before = hashes(out)
    quiet = run(table, out, *options, "--time-limit", "20", "-q")
    left = ROWS - len(results(out))
    assert 0 < left < ROWS - done, "the limit counts from the start of this command"
    assert (quiet.code, quiet.stderr) == (75, LINE.format(f"{left} images are") + "\n")
    assert f"{left} left" in quiet.stdout
    assert run(table, out, *options).code == 0
    assert before.items() <= hashes(out).items()
    assert {row["attempt"] for row in results(out)} == {1}


def test_run_that_ends_in_time_prints_nothing(table: Path, tmp_path: Path) -> None:
    done = run(table, tmp_path / "out", "--limit", "1", "--time-limit", "1h", "-q")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


def test_results_are_merged_when_the_time_limit_is_reached(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now))

    def merge_late(*arguments: Any) -> Counts:
        nonlocal now
        now = 7200.0
        return merge_tables(*arguments)

    monkeypatch.setattr("batch_infer.jobs.execution.merge_tables", merge_late)
    done = run(table, tmp_path / "out", "--limit", "1", "--time-limit", "1h", "-q")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    assert len(results(tmp_path / "out")) == 1


@pytest.mark.promises
@pytest.mark.usefixtures("_ticking")
def test_retry_is_stopped_too(table: Path, tmp_path: Path) -> None:
    """All rows have old results, so the remaining images are those of the retry."""
    out = tmp_path / "out"
    options = ("--slots", "2", "--num-processes", "0")
    assert run(table, out, *options).code == 0
    for image in (out / "images").rglob("*.png"):
        image.unlink()
    stopped = command("retry", out, "--status", "missing", "--time-limit", "20")
    again = sum(row["attempt"] == 2 for row in results(out))
    assert 0 < again < ROWS
    assert stopped.code == 75
    assert stopped.stderr.splitlines()[-1] == LINE.format(f"{ROWS - again} images are")
    assert (
        stopped.stdout.splitlines()[-1] == f"stopped early: {ROWS - again} left; run the same command again to continue"
    )
    assert command("retry", out, "--status", "missing", "-q").code == 0
    assert_whole(out)


def test_plan_checks_the_time_limit(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = SizePlan(64, 64, images=ROWS, row_forwards=80, ticks=40, slots=16, seconds=80.0)
    plan = Plan(rows=ROWS, total=ROWS, pending=ROWS, sizes=[size], occupancy=1.0, seconds=90.0, measured_at=utc_now())
    monkeypatch.setattr("batch_infer.jobs.make_plan", lambda *_: plan)
    arguments = ("plan", table, "--out", tmp_path / "out", *QUICK)
    short = command(*arguments, "--time-limit", "1m")
    assert short.code == 0, "a short limit is not an error"
    assert short.stdout.splitlines()[-1] == (
        "limit    1 min 00 s, too short: the run would stop with exit code 75, and the same command would continue it"
    )
    assert command(*arguments, "--time-limit", "1m", "-q").stdout == short.stdout, "reported with -q too"
    enough = command(*arguments, "--time-limit", "1m30s").stdout
    assert enough.splitlines()[-1] == "limit    1 min 30 s, sufficient"
    assert command(*arguments, "--time-limit", "1m30s", "-q").stdout == ""
    assert "limit" not in command(*arguments).stdout
    for options, limits in (("--time-limit=1m",), (60, False)), (("--time-limit=2m",), (120, True)), ((), (None, None)):
        planned = json.loads(command(*arguments, "--json", *options).stdout)
        assert (planned["time_limit"], planned["within_time_limit"]) == limits
