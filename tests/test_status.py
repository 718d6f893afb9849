"""`batch-infer status`: the progress of a running, killed or finished run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batch_infer.errors import StorageError
from batch_infer.jobs import out as outdir
from batch_infer.stopping import StopRequested
from tests.paced import MODULE
from tests.runs import command, results, run, settings_of, start, wait_for
from tests.tables import write_csv


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [["prompt"], ["a red circle"], [""], *([f"a red circle, {i}"] for i in range(24))]
    return write_csv(tmp_path / "t.csv", rows)


def status(out: Path) -> dict[str, Any]:
    done = command("status", out, "--json")
    assert done.code == 0, done.stderr
    return dict(json.loads(done.stdout))


def total(report: dict[str, Any]) -> int:
    return int(sum(report["counts"].values()) + report["left"])


def test_status_counts_the_results_of_a_finished_run(table: Path, out: Path) -> None:
    assert run(table, out, "--limit", "4").code == 3
    report = status(out)
    assert (report["state"], report["holder"], report["left"]) == ("finished", None, 0)
    counts = report["counts"]
    assert (counts["ok"] + counts["flagged"], counts["blocked"], counts["invalid"], counts["failed"]) == (3, 0, 1, 0)
    assert command("status", out).stdout.splitlines()[0].startswith(f"{out}: finished, started 20")


@pytest.mark.promises
def test_status_reports_running_and_killed_runs(table: Path, out: Path) -> None:
    """Only committed results count."""
    assert run(table, out, "--limit", "2").code == 3
    before = len(list((out / "manifest").glob("part-*")))
    with start(table, out, program=MODULE, PACE_HOLD="16") as process:
        assert wait_for(process, lambda: len(list((out / "manifest").glob("part-*"))) > before)
        early = status(out)
        assert wait_for(process, lambda: status(out)["images_per_second"] is not None)
        running = status(out)
        read = command("status", out).stdout
        process.kill()
        process.communicate()
    assert running["state"] == "running"
    assert f"process {process.pid}," in running["holder"]
    assert running["left"] <= early["left"] < 24
    assert running["images_per_second"] > 0
    assert f"{out}: running by " in read
    assert "images/s, about " in read
    stopped = status(out)
    assert (stopped["state"], stopped["holder"], total(running), total(stopped)) == ("stopped", None, 26, 26)
    assert stopped["counts"]["invalid"] == 1
    assert command("status", out).stdout.endswith("run the same command again to continue\n")
    assert command("merge", out).code == 0
    assert len(results(out)) == 26 - stopped["left"]
    merged = status(out)
    assert {name: merged[name] for name in stopped} == {**stopped, "is_stale": False}
    assert run(table, out).code == 3
    assert status(out)["state"] == "finished"


def test_status_has_no_total_during_the_scan(table: Path, out: Path) -> None:
    assert run(table, out, "--limit", "2").code == 3
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "survey": None, "summary": None}))
    assert status(out)["left"] is None
    assert "total unknown" in command("status", out).stdout
    with outdir.locked(out):
        assert "the tables are being scanned" in command("status", out).stdout


def test_status_is_unknown_if_the_lock_is_unreadable(table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(table, out, "--limit", "1").code == 0
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "summary": None}))

    def refuse(path: Path) -> str | None:
        raise StorageError(f"cannot read {path}/.lock: Permission denied")

    monkeypatch.setattr("batch_infer.store.local.find_holder", refuse)
    report = status(out)
    assert (report["state"], report["holder"], report["left"]) == ("unknown", None, 0)
    lines = command("status", out).stdout.splitlines()
    assert lines[0].startswith(f"{out}: unknown, started 20")
    assert lines[-1] == f"the lock of {out} cannot be read, so it is unknown whether a run is active"


def test_status_of_a_stopped_run_counts_remaining_results(table: Path, out: Path) -> None:
    from batch_infer.cli.progress import ProgressGroup
    from batch_infer.jobs.run import render_tables as score

    score(settings_of(table, out), ProgressGroup(), stop=lambda: True)
    report = status(out)
    assert (report["state"], report["left"], report["counts"]["invalid"]) == ("stopped", 25, 1)


def test_stale_results_of_a_stopped_run_are_reported(table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run warns about them, and `status` reports them until they are merged."""
    assert run(table, out, "--limit", "2").code == 3
    assert not status(out)["is_stale"]
    before = (out / "results.parquet").read_bytes()

    def merge(*_: Any) -> None:
        raise StopRequested

    with monkeypatch.context() as patch:
        patch.setattr("batch_infer.jobs.execution.merge_tables", merge)
        done = run(table, out)
    assert done.code == 75
    assert f"{out}/results.parquet was not updated (there was no time to merge): run `batch-infer merge" in done.stderr
    assert (out / "results.parquet").read_bytes() == before
    assert status(out)["is_stale"]
    assert f"results.* are out of date: run `batch-infer merge {out}` to update them" in command("status", out).stdout
    assert command("merge", out).code == 0
    assert not status(out)["is_stale"]
    assert len(results(out)) == 26


def test_status_does_not_disturb_a_run(table: Path, out: Path) -> None:
    assert run(table, out, "--limit", "1").code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    status(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_status_loads_no_torch(table: Path, out: Path) -> None:
    assert run(table, out, "--limit", "1").code == 0
    script = (
        f"import sys; from batch_infer.__main__ import main; sys.argv = ['batch-infer', 'status', {str(out)!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("content", [None, "{}", "[]", "{", '{"identity": {}, "summary": {}}'])
def test_status_of_a_folder_without_a_run(out: Path, content: str | None) -> None:
    out.mkdir()
    if content is not None:
        (out / "run.json").write_text(content)
    done = command("status", out)
    assert (done.code, done.stdout) == (2, "")
    assert str(out) in done.stderr
