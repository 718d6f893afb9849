"""The figures of an active run in run.json, which `status` shows while the run renders and after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batch_infer.engines import TaskReport
from batch_infer.errors import StorageError
from batch_infer.jobs import out as outdir
from batch_infer.jobs import progress
from batch_infer.jobs.progress import LiveFigures
from batch_infer.jobs.run_folder import RunFolder
from batch_infer.jobs.summary import Throughput
from tests.runs import command, run, run_json
from tests.tables import write_csv


class Folder(RunFolder):
    """Keeps the entries for run.json in memory."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def update_record(self, **entries: Any) -> None:
        self.written.append(entries["progress"])


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("batch_infer.jobs.progress.time.monotonic", lambda: now[0])
    return now


def test_figures_are_written_at_intervals_and_after_each_death(now: list[float]) -> None:
    folder = Folder()
    figures = LiveFigures(folder)
    figures.report(TaskReport([], 0.0, 2, deaths=1))
    assert not folder.written, "no worker is ready"
    figures.start(Throughput())
    for seconds, deaths, written in ((0, 0, 0), (29, 0, 0), (30, 0, 1), (31, 0, 1), (32, 1, 2), (33, 1, 2), (62, 1, 3)):
        now[0] = 100.0 + seconds
        figures.report(TaskReport([], 0.0, 2, deaths=deaths))
        assert len(folder.written) == written
    assert [entry["deaths"] for entry in folder.written] == [0, 1, 1]
    assert not {"rows", "images", "ok", "left", "bad_results"} & folder.written[-1].keys(), "the manifest counts these"


def test_a_run_continues_if_its_figures_cannot_be_written(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Folder, **entries: Any) -> None:
        raise StorageError("the bucket is unreachable")

    monkeypatch.setattr(Folder, "update_record", fail)
    figures = LiveFigures(Folder())
    figures.start(Throughput())
    now[0] += 60.0
    figures.report(TaskReport([], 0.0))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    long = "a very long prompt " * 40
    return write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"], [long], *([f"a ring {i}"] for i in range(30))])


def test_status_shows_the_figures_of_an_active_and_of_a_killed_run(
    table: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that writes its figures with every commit is stopped as by a kill, in that nothing is written later."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    written: list[dict[str, Any]] = []
    write_run = outdir.write_run

    def keep(store: Any, record: Any) -> None:
        written.append(json.loads(json.dumps(record, default=str)))
        write_run(store, record)

    with monkeypatch.context() as patch:
        patch.setattr(outdir, "write_run", keep)
        assert run(table, out, "--slots", "4").code == 0
    assert "progress" not in run_json(out), "the summary replaces it"
    live = [record for record in written if record.get("progress")][-1]
    assert live["progress"]["stage_shares"]["denoise"] > 0
    live["progress"] |= {"deaths": 1, "rendered": 200, "energy_wh": 7.0, "energy_wh_per_image": 0.035}
    (out / "run.json").write_text(json.dumps(live))

    killed = command("status", out).stdout.splitlines()
    assert killed[0].startswith(f"{out}: stopped, started 20")
    assert f"prompts  1 is too long for the model, which ignores its end: {table}, line 3 (t-00000001)" in killed
    assert f"workers  1 worker died, and others took over the unfinished rows (see {out}/logs)" in killed
    assert any(line.startswith("time     denoise ") for line in killed)
    assert "energy   7 Wh on the GPU, 35 mWh per image" in killed
    with outdir.locked(out):
        active = command("status", out).stdout.splitlines()
        assert active[0].startswith(f"{out}: running by ")
        assert active[-5:] == killed[2:7], "prompts, workers, time and energy"
        status = json.loads(command("status", out, "--json").stdout)
    assert (status["truncated"], status["deaths"], status["energy_wh"]) == (1, 1, 7.0)
    assert status["counts"]["ok"] + status["counts"]["flagged"] == 32
    assert command("merge", out).code == 0
    assert command("status", out).stdout.splitlines()[1].startswith("32 rows · ")
