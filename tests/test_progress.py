"""Progress, metrics, summary and `status` show the same rate, and progress says when the model is loading."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from batch_infer.cli import progress
from batch_infer.cli.logs import set_up_logging
from batch_infer.cli.metrics import Metrics
from batch_infer.cli.progress import ProgressBar, ProgressGroup, ProgressLog
from batch_infer.engines.local import LocalEngine
from batch_infer.jobs import execution, render_tables
from batch_infer.jobs import out as outdir
from batch_infer.jobs import status as status_job
from batch_infer.jobs.scan import ScanResult
from batch_infer.jobs.summary import Throughput
from batch_infer.records import ResultRow, Status, utc_now
from tests.deaths import eventually
from tests.engine_runs import EngineRun
from tests.runs import run, run_json, settings_of
from tests.tables import write_csv


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.began_at = utc_now() - timedelta(seconds=self.seconds)

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> Any:
        return self.began_at + timedelta(seconds=self.seconds)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", [["prompt"], *([f"a red circle, {i}"] for i in range(3))])


def rows(*statuses: Status) -> list[ResultRow]:
    return [
        ResultRow(
            id=f"{i}",
            image_index=0,
            prompt="x",
            status=status,
            finished_at=utc_now(),
            source_file="t.csv",
            source_row=i,
            fingerprint="f",
        )
        for i, status in enumerate(statuses)
    ]


def commit(listener: Any, throughput: Throughput, *statuses: Status) -> None:
    """Commit rows as a run does: `throughput` counts them before the listener is called."""
    throughput.add(rows(*statuses))
    listener.committed(rows(*statuses))


def test_throughput_counts_from_its_start_to_the_latest_commit(clock: Clock) -> None:
    throughput = Throughput(clock)
    assert (throughput.images_per_second, throughput.estimate_seconds(3)) == (None, None)
    clock.seconds += 10
    throughput.add(rows("ok", "flagged", "failed", "blocked"))
    clock.seconds += 100
    assert (throughput.rendered, throughput.committed, throughput.seconds) == (2, 4, 10)
    assert (throughput.images_per_second, throughput.estimate_seconds(6)) == (0.2, 15)


def test_log_lines_say_when_the_model_loads_and_count_from_then(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging(quiet=False, verbose=False)
    lines = ProgressLog(clock)
    lines.start(
        ScanResult(total=10, finished=2, pending=8, reasons={"new": 1, "changed": 7}, changes="height 64 -> 72")
    )
    started = [
        "batch-infer: 8 to render: 1 new, 7 changed (height 64 -> 72); 2 already done",
        "batch-infer: loading model",
    ]
    assert capsys.readouterr().err.splitlines() == started
    clock.seconds += 50
    throughput = Throughput(clock)
    lines.ready(throughput)
    for seconds in (5, 5, 1, 4):
        clock.seconds += seconds
        commit(lines, throughput, "ok", "failed")
    lines.close()
    assert capsys.readouterr().err.splitlines() == [
        "batch-infer: model loaded, rendering",
        "batch-infer: 4 of 10, 0.20 images/s, 00:15 left, 0 flagged, 1 failed",
        "batch-infer: 10 of 10, 0.27 images/s, 0 flagged, 4 failed",
    ]


def test_last_line_is_logged_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(quiet=False, verbose=False)
    lines = ProgressLog(clock)
    lines.start(ScanResult(total=1, pending=1))
    throughput = Throughput(clock)
    lines.ready(throughput)
    clock.seconds += 20
    commit(lines, throughput, "ok")
    lines.close()
    logged = capsys.readouterr().err.splitlines()
    assert [line for line in logged if "per image" in line] == [
        "batch-infer: 1 of 1, 20.0 s per image, 0 flagged, 0 failed"
    ]


def test_the_log_says_when_no_image_is_finished_for_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_WAIT", 0.1)
    set_up_logging(quiet=False, verbose=False)
    lines, throughput, logged, before = ProgressLog(), Throughput(), [], {*threading.enumerate()}
    lines.start(ScanResult(total=2, pending=2))
    lines.ready(throughput)

    def count_waiting() -> int:
        return sum(thread.name == progress.WAITING for thread in {*threading.enumerate()} - before)

    lines.ready(throughput)  # rendering begins again
    assert eventually(lambda: count_waiting() == 1)
    waiting = "no image is finished after {}; images of one batch finish together, and the first may be slow"

    def has_waited() -> bool:
        logged.extend(capsys.readouterr().err.splitlines())
        return any(waiting.format("0.2 s") in line for line in logged)

    assert eventually(has_waited)
    commit(lines, throughput, "ok")
    assert eventually(lambda: count_waiting() == 0)
    assert any(waiting.format("0.1 s") in line for line in logged)
    lines.close()


def test_bar_shows_the_same(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = ProgressBar()
    bar.start(ScanResult(total=10, finished=2, pending=8))
    assert terminal.getvalue().rstrip().endswith("2/10, loading model")
    clock.seconds += 50
    throughput = Throughput(clock)
    bar.ready(throughput)
    assert terminal.getvalue().split("\r")[-1].rstrip().endswith("2/10, 0 flagged, 0 failed")
    assert "images/s" not in terminal.getvalue()
    clock.seconds += 10
    commit(bar, throughput, "ok", "failed", "ok", "ok")
    bar.close()
    assert terminal.getvalue().split("\r")[-1].strip().endswith("6/10, 0.30 images/s, 00:10 left, 0 flagged, 1 failed")


def test_metrics_count_from_when_the_model_is_loaded(clock: Clock, tmp_path: Path) -> None:
    file = tmp_path / "m.prom"
    with Metrics(file, str(tmp_path / "out")) as metrics:
        metrics.start(ScanResult(total=4, pending=4))
        clock.seconds += 50
        throughput = Throughput(clock)
        metrics.ready(throughput)
        clock.seconds += 8
        commit(metrics, throughput, "ok", "failed")
    values = [line.split()[-1] for line in file.read_text().splitlines() if "images_per_second{" in line]
    assert values == ["0.125"]


class Recorder(ProgressGroup):
    """Records the rates of throughput and `status` at each call."""

    def __init__(self, out: Path, clock: Clock) -> None:
        super().__init__()
        self._out, self._clock = out, clock
        self._throughput: Throughput | None = None
        self.calls: list[str] = []
        self.rates: list[tuple[float | None, float | None]] = []

    def start(self, scan: ScanResult) -> None:
        self._record("start")

    def ready(self, throughput: Throughput) -> None:
        self._throughput = throughput
        self._record("ready")
        self._clock.seconds += 4

    def committed(self, rows: Sequence[ResultRow]) -> None:
        self._record("committed")

    def _record(self, call: str) -> None:
        self.calls.append(call)
        rate = self._throughput.images_per_second if self._throughput else None
        self.rates.append((round(rate, 3) if rate else None, status_job.read_status(self._out).images_per_second))


def test_status_summary_and_last_line_agree(
    table: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(execution, "Throughput", lambda in_flight: Throughput(clock, in_flight))
    for module in (execution, status_job):
        monkeypatch.setattr(module, "utc_now", clock.now)
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)
    set_up_logging(quiet=False, verbose=False)
    out = tmp_path / "out"
    recorder = Recorder(out, clock)
    summary = render_tables(settings_of(table, out), ProgressGroup(recorder, ProgressLog(clock)))
    assert recorder.calls[:3] == ["start", "ready", "committed"]
    assert recorder.rates[0] == (None, None)
    assert run_json(out)["in_flight"] == 3
    rates = [(counted, read) for counted, read in recorder.rates if counted is not None]
    assert all(read is not None and read >= counted for counted, read in rates)  # a worker commits before it reports
    assert recorder.rates[-1] == (0.75, 0.75)
    assert summary.as_dict()["images_per_second"] == 0.75
    ended = status_job.read_status(out)
    assert (ended.state, ended.images_per_second, ended.seconds_left) == ("finished", 0.75, None)
    assert "3 of 3, 0.75 images/s, 3 flagged" in capsys.readouterr().err


def test_no_rate_before_the_first_batch_is_committed() -> None:
    """Eight rows finish together after 80 s, and their results come one by one: they take 10 s each, not 80."""
    clock = Clock()
    throughput = Throughput(clock, in_flight=8)
    clock.seconds += 80
    for _ in range(7):
        throughput.add(rows("ok"))
        assert (throughput.images_per_second, throughput.estimate_seconds(15)) == (None, None)
    throughput.add(rows("ok"))
    assert (throughput.images_per_second, throughput.estimate_seconds(15)) == (0.1, 150)


def test_run_has_no_rate_before_it_renders(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(table, out).code == 0
    record = json.loads((out / "run.json").read_text())
    assert record["rendering_since"]
    (out / "run.json").write_text(json.dumps({**record, "summary": None, "rendering_since": None}))
    with outdir.locked(out):
        assert status_job.read_status(out).images_per_second is None


@pytest.mark.promises
def test_workers_are_ready_once_before_the_first_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    render: Callable[..., Any] = LocalEngine.render

    def record_calls(engine: LocalEngine, task: Any, on_commit: Callable[..., None], stop: Any) -> Any:
        def commit(rows: Any) -> None:
            calls.append("committed")
            on_commit(rows)

        return render(engine, task, commit, stop, lambda: calls.append("ready"))

    monkeypatch.setattr(LocalEngine, "render", record_calls)
    EngineRun(tmp_path / "out", [f"red {i}" for i in range(6)]).run()
    assert calls[0] == "ready"
    assert set(calls[1:]) == {"committed"}
