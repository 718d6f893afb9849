"""The overhead of a run with a dummy model: rows per second, and the gain of a second worker."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from batch_infer.cli.progress import ProgressGroup
from batch_infer.engines.local import LocalEngine
from batch_infer.jobs import run as job
from batch_infer.jobs.summary import Summary
from batch_infer.settings import RowDefaults, RunSettings, TableSettings
from tests import dummies
from tests.runs import assert_whole, results
from tests.tables import write_csv

Render = Callable[[int, int, Any], tuple[Summary, Path]]


@pytest.fixture
def render_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Render:
    """Render rows of 64x64 pixels in worker processes with a dummy chain."""

    def run(rows: int, processes: int, load: Any) -> tuple[Summary, Path]:
        out = tmp_path / f"{rows}-{processes}"
        table = write_csv(tmp_path / "table.csv", [["prompt"], *([f"row {k}"] for k in range(rows))])
        monkeypatch.setattr(job, "make_engine", lambda *_: LocalEngine("cpu", processes, load=load))
        settings = RunSettings(TableSettings((str(table),)), str(out), defaults=RowDefaults(guidance_scale=1.0))
        return job.render_tables(settings, ProgressGroup()), out

    return run


@pytest.mark.soak
def test_a_worker_commits_a_thousand_rows_per_second(render_rows: Render, capfd: pytest.CaptureFixture[str]) -> None:
    summary, out = render_rows(20_000, 1, dummies.load)
    with capfd.disabled():
        print(f"\n{summary.images_per_second:.0f} rows/s by one worker")
    assert summary.counts.ok == 20_000
    assert_whole(out)
    assert (summary.images_per_second or 0) >= 1000


@pytest.mark.soak
def test_two_workers_are_twice_as_fast_as_one(render_rows: Render, capfd: pytest.CaptureFixture[str]) -> None:
    """The model only waits. At the end, no worker is idle for longer than a chunk of 32 rows takes."""
    one, _ = render_rows(3200, 1, dummies.load_waiting)
    two, out = render_rows(3200, 2, dummies.load_waiting)
    ends: dict[str, datetime] = {}
    for row in results(out):
        ends[row["worker"]] = max(row["finished_at"], ends.get(row["worker"], row["finished_at"]))
    gain = (two.images_per_second or 0) / (one.images_per_second or 1)
    idle = (max(ends.values()) - min(ends.values())).total_seconds()
    with capfd.disabled():
        print(f"\ntwo workers: {gain:.2f} times one; at the end one was idle for {idle:.2f} s")
    assert len(ends) == 2
    assert gain >= 1.9
    assert idle <= 32 / dummies.BATCH_ROWS * dummies.BATCH_SECONDS
