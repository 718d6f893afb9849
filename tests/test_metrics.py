"""Test the --metrics-file at the start, during and at every end of a run, with Prometheus' own parser."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import batch_infer
from batch_infer.cli import metrics as metrics_module
from batch_infer.cli.metrics import GAUGES, STATUSES, Metrics
from batch_infer.errors import SettingsError, StoppedError
from batch_infer.jobs.out import locked
from batch_infer.jobs.scan import ScanResult
from batch_infer.jobs.summary import Counts, Summary, Throughput
from batch_infer.records import ResultRow, utc_now
from tests.runs import command, run
from tests.tables import write_csv


def rows(*statuses: Any) -> list[ResultRow]:
    return [
        ResultRow(id=f"{i}", image_index=0, prompt="x", status=status, finished_at=utc_now(), source_file="t.csv",
                  source_row=i, fingerprint="f") for i, status in enumerate(statuses)
    ]  # fmt: skip


def read(file: Path, out: Path | str) -> dict[str, Any]:
    """Return values by name without prefix, those of `results` by status, and the labels of the info metric."""
    values: dict[str, Any] = {"results": {}}
    for family in text_string_to_metric_families(file.read_text("utf-8")):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            name, labels = sample.name.removeprefix("batch_infer_"), dict(sample.labels)
            assert sample.name.startswith("batch_infer_")
            assert labels.pop("out") == str(out)
            if name == "info":
                values["info"] = labels
            elif labels:
                values["results"][labels["status"]] = sample.value
            else:
                values[name] = sample.value
    return values


def results_by_status(**counts: int) -> dict[str, int]:
    return dict.fromkeys(STATUSES, 0) | counts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "nightly.prom"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace both clocks with one that the test advances."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(
        metrics_module, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 1e9 + clock.now)
    )
    return clock


def test_metrics_follow_a_run(file: Path, clock: SimpleNamespace) -> None:
    with Metrics(file, "/out", "sd") as metrics:
        assert not file.exists(), "OUT may belong to another run"
        clock.now = 108
        skipped = {"ok": 3, "failed": 1, "left": 2}
        metrics.start(ScanResult(total=15, finished=6, invalid=1, pending=8, skipped=skipped))
        assert read(file, "/out") == {
            "results": results_by_status(ok=3, failed=1, invalid=1), "results_left": 10,
            "info": {"version": batch_infer.__version__, "model": "sd"}, "running": 1,
            "start_timestamp_seconds": 1e9 + 100, "images_rendered": 0, "images_per_second": 0,
        }  # fmt: skip
        throughput = Throughput(lambda: clock.now)
        metrics.ready(throughput)
        clock.now = 112
        for listener in (throughput.add, metrics.committed):
            listener(rows("ok", "flagged", "failed", "invalid"))
        assert read(file, "/out")["results_left"] == 10, "written at most every ten seconds"
        clock.now = 118
        for listener in (throughput.add, metrics.committed):
            listener(rows("ok", "blocked"))
        during = read(file, "/out")
        assert during["results"] == results_by_status(ok=5, flagged=1, failed=2, invalid=2, blocked=1)
        assert (during["results_left"], during["images_rendered"]) == (4, 3)
        assert during["images_per_second"] == pytest.approx(0.3)
        assert during["running"] == 1
        assert skipped == {"ok": 3, "failed": 1, "left": 2}, "the scan is shared"
        metrics.close()
        clock.now = 130
        counts = Counts(rows=15, ok=7, flagged=1, failed=2, invalid=2, blocked=1, remaining=2)
        metrics.conclude(Summary(counts, rendered=5, rendering_seconds=20.0, processes=2, deaths=1, energy_wh=7.5), 0)
    ended = read(file, "/out")
    assert ended["results"] == results_by_status(ok=7, flagged=1, failed=2, invalid=2, blocked=1)
    assert (ended["results_left"], ended["images_rendered"], ended["images_per_second"]) == (2, 5, 0.25)
    assert (ended["running"], ended["exit_code"]) == (0, 0)
    assert (ended["workers"], ended["worker_deaths"], ended["energy_watt_hours"]) == (2, 1, 7.5)
    assert ended["end_timestamp_seconds"] == ended["last_success_timestamp_seconds"] == 1e9 + 130
    assert set(GAUGES) == set(ended) - {"results", "info"}


@pytest.mark.parametrize(
    ("error", "code"),
    [(StoppedError("now"), 75), (KeyboardInterrupt(), 75), (SettingsError("x"), 2), (ZeroDivisionError(), 1)],
)
@pytest.mark.parametrize("started", [False, True])
def test_error_sets_the_exit_code_and_keeps_the_last_success(
    file: Path, clock: SimpleNamespace, error: BaseException, code: int, started: bool
) -> None:
    with Metrics(file, "/out", "sd") as metrics:
        metrics.conclude(Summary(Counts(rows=2, ok=1, remaining=1), rendered=1, rendering_seconds=1.0, deaths=1), 0)
    clock.now = 500
    with pytest.raises(type(error)), Metrics(file, "/out") as metrics:
        if started:
            metrics.start(ScanResult(total=2, finished=1, pending=1, skipped={"ok": 1}))
        before_the_error = read(file, "/out")
        assert (before_the_error["running"], before_the_error["exit_code"]) == (started, 0)
        assert before_the_error["end_timestamp_seconds"] == 1e9 + 100
        assert before_the_error["info"]["model"] == "sd", "kept until the new one is known"
        raise error
    ended = read(file, "/out")
    assert (ended["running"], ended["exit_code"], ended["images_rendered"]) == (0, code, 0)
    assert (ended["last_success_timestamp_seconds"], ended["end_timestamp_seconds"]) == (1e9 + 100, 1e9 + 500)
    assert ended["start_timestamp_seconds"] == 1e9 + 500
    assert (ended["results"], ended["results_left"]) == (results_by_status(ok=1), 1), "the last known values"
    assert not {"workers", "worker_deaths"} & ended.keys(), "unknown values are not written"


@pytest.mark.parametrize("before", [False, True])
def test_refused_second_run_does_not_change_the_file(tmp_path: Path, file: Path, before: bool) -> None:
    table, out = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]]), tmp_path / "out"
    with Metrics(file, str(out), "first") as metrics, locked(out):
        if before:
            metrics.start(ScanResult(total=1, pending=1))
        content = file.read_bytes() if before else None
        assert run(table, out, "--metrics-file", file).code == 75
        assert (file.read_bytes() if file.exists() else None) == content
        metrics.conclude(Summary(), 0)
    assert read(file, out)["info"]["model"] == "first"


def test_label_is_the_absolute_path_of_out(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for out in ("out", "./out/", "x/../out", str(tmp_path / "out"), "~/out"):
        with Metrics(file, out):
            pass
        assert read(file, tmp_path / "out")["exit_code"] == 1


def test_label_may_contain_any_characters(file: Path) -> None:
    out = '/a "b"\\n\n{c="d"},ü/x'
    for _ in range(2):
        with Metrics(file, out, 'm"\n\\') as metrics:
            metrics.conclude(Summary(), 0)
        assert read(file, out)["info"]["model"] == 'm"\n\\'
    assert read(file, out)["last_success_timestamp_seconds"] == pytest.approx(time.time(), abs=60)


def test_metrics_of_another_out_are_not_kept(file: Path) -> None:
    with Metrics(file, "/one", "sd") as metrics:
        metrics.conclude(Summary(Counts(ok=9)), 0)
    with Metrics(file, "/two", "sd"):
        pass
    assert read(file, "/two")["results"] == {}
    assert "last_success_timestamp_seconds" not in read(file, "/two")


@pytest.mark.parametrize("content", [b"batch_infer_exit_code{ 3", b"\xff\xfe", b"x 1 2 3 4 five"])
def test_unreadable_file_is_replaced(file: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    file.write_bytes(content)
    with Metrics(file, "/out", "sd") as metrics:
        metrics.conclude(Summary(), 3)
    assert read(file, "/out")["exit_code"] == 3
    assert [record.message.startswith(f"the metrics file {file} cannot be read") for record in caplog.records] == [True]


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "1e300"])
def test_invalid_values_are_not_kept(file: Path, value: str) -> None:
    series = [f'batch_infer_{name}{{out="/out"}} {value}' for name in GAUGES]
    series += [f'batch_infer_results{{out="/out",status="{status}"}} {value}' for status in STATUSES]
    series += ['batch_infer_results{out="/out"} 3', 'batch_infer_info{out="/out"} NaN']
    file.write_text("\n".join(series) + "\n")
    with Metrics(file, "/out") as metrics:
        metrics.start(ScanResult(total=1, pending=1))
        metrics.committed(rows("ok"))
    values = read(file, "/out")
    assert (values["exit_code"], values["results"], values["results_left"]) == (1, results_by_status(ok=1), 0)
    assert all(map(math.isfinite, [each for name, each in values.items() if name not in ("results", "info")]))


def test_write_error_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with Metrics(folder / "m.prom", "/out", "sd") as metrics:
        assert list(folder.iterdir()) == [], "the test file was removed"
        folder.rmdir()
        metrics.start(ScanResult(total=1, pending=1))
        metrics.conclude(Summary(), 0)
    message = f"the metrics file {folder}/m.prom cannot be written: No such file or directory"
    assert [(record.levelname, record.message) for record in caplog.records] == [("ERROR", message)], "with -q too"
    folder.mkdir()
    with Metrics(folder / "m.prom", "/out", "sd") as metrics:
        metrics.start(ScanResult(total=1, pending=1))
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        metrics.conclude(Summary(), 0)
    assert read(folder / "m.prom", "/out")["running"] == 0
    for where in (folder, tmp_path / "moved"):
        assert [path.name for path in where.iterdir()] == ["m.prom"], "no temporary file is left"


def test_file_name_without_prom_causes_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("m.prom", "m.tmp", "m"):
        with Metrics(tmp_path / name, "/out"):
            pass
        assert read(tmp_path / name, "/out")["exit_code"] == 1
    message = "node_exporter's textfile collector reads only *.prom files, so it ignores"
    assert [record.message for record in caplog.records] == [f"{message} {tmp_path / name}" for name in ("m.tmp", "m")]


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing/m.prom", "there is no folder"), (".", "is a directory"),
     ("m" * 250 + ".prom", "cannot be written: File name too long")],
)  # fmt: skip
@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_file_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str, source: str
) -> None:
    table, config = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]]), tmp_path / "job.toml"
    config.write_text(f"metrics-file = '{tmp_path / name}'\n" if source == "file" else "")
    if source == "variable":
        monkeypatch.setenv("BATCH_INFER_METRICS_FILE", str(tmp_path / name))
    flag = ("--metrics-file", tmp_path / name) if source == "flag" else ()
    done = run(table, tmp_path / "out", "--config", config, *flag)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_exit_code_of_a_run_is_written(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, out = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"], [""]]), tmp_path / "out"
    options = ("--metrics-file", file, "-q")

    def run_until_end(code: int, *more: str) -> Mapping[str, Any]:
        assert run(table, out, *options, *more).code == code
        values = read(file, out)
        assert (values["exit_code"], values["running"]) == (code, 0)
        assert values["start_timestamp_seconds"] <= values["end_timestamp_seconds"] <= time.time()
        return values

    def stop(*_: Any) -> None:
        raise StoppedError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("batch_infer.jobs.render_tables", stop)
        assert "last_success_timestamp_seconds" not in run_until_end(75)
    failed = run_until_end(3)
    assert (failed["results"], failed["results_left"]) == (results_by_status(ok=1, invalid=1), 0)
    assert failed["images_rendered"] == 1
    assert failed["images_per_second"] > 0
    assert failed["info"] == {"version": batch_infer.__version__, "model": "demo"}
    success = run_until_end(0, "--max-failed", "1")
    assert success["images_rendered"] == 0, "counts of this run"
    assert success["results"] == failed["results"]
    assert (
        run_until_end(2, "--scheduler", "Nonsense:")["last_success_timestamp_seconds"]
        == success["end_timestamp_seconds"]
    )
    assert command("retry", out, "--status", "ok", *options).code == 2, "unknown status"
    next((out / "images").rglob("*.png")).unlink()
    assert command("retry", out, "--status", "missing", "--max-failed", "1", *options).code == 2, (
        "an unknown option changes no metrics"
    )
    assert command("retry", out, "--status", "missing", *options).code == 0
    again = read(file, out)
    assert (again["exit_code"], again["images_rendered"], again["info"]["model"]) == (0, 1, "demo")

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("batch_infer.jobs.render_tables", fail)
    with pytest.raises(ZeroDivisionError):
        run(table, out, *options)
    assert (read(file, out)["exit_code"], read(file, out)["running"]) == (1, 0)


def test_only_rank_0_writes(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks render rows but print nothing."""
    monkeypatch.setattr("batch_infer.jobs.join_run", lambda *_: True)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    done = run(tmp_path / "t.csv", tmp_path / "out", "--metrics-file", file)
    assert (done.code, done.stdout, done.stderr, file.exists()) == (0, "", "", False)
    monkeypatch.delenv("MASTER_ADDR")
    assert run(tmp_path / "t.csv", tmp_path / "out", "--metrics-file", file).code == 0
    assert file.exists(), "RANK alone does not mean a launcher"


def test_plan_takes_the_option_and_writes_nothing(tmp_path: Path, file: Path) -> None:
    done = command("plan", tmp_path / "missing.csv", "--metrics-file", file)
    assert (done.code, file.exists()) == (2, False)


def test_write_error_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prometheus_client, "write_to_textfile", full)
    table, file = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]]), tmp_path / "m.prom"
    done = run(table, tmp_path / "out", "--metrics-file", file)
    assert done.code == 0
    assert done.stderr.count(f"the metrics file {file} cannot be written: No space left on device") == 1
