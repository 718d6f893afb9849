"""Test that engines account for every row, even if worker processes die or hang."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from batch_infer import errors
from batch_infer.engines import supervisor
from batch_infer.engines.handle import Timeouts, WorkerCrashError, WorkerHandle, shut_down
from batch_infer.engines.local import LocalEngine
from batch_infer.engines.messages import WorkerError
from batch_infer.engines.protocol import WorkersLostError
from batch_infer.errors import BatchInferError, ModelError, SettingsError, StorageError
from batch_infer.manifest import Manifest
from tests import dummies
from tests.engine_runs import EngineRun


@pytest.mark.promises
def test_two_workers_share_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEET", str(tmp_path / "meeting"))
    engine_run = EngineRun(tmp_path / "out", ["a"] * 200, load=dummies.load_together)
    report = engine_run.run()
    engine_run.assert_accounted()
    assert (report.processes, report.deaths) == (2, 0)
    assert len({row.worker for row in engine_run.committed}) == 2
    assert sum(worker.total.images for worker in report.worker_reports) == 200
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.promises
@pytest.mark.parametrize(
    ("prompt", "cause"),
    [("die by SIGKILL", "killed by SIGKILL"), ("raise fault", "RuntimeError: the device said fault")],
)
def test_a_row_that_kills_its_process_costs_no_other_row(tmp_path: Path, prompt: str, cause: str) -> None:
    """The row fails after three attempts, the last one alone. A row that kills only one process is then rendered."""
    prompts = ["a"] * 200
    prompts[30], prompts[150] = prompt, f"die once {tmp_path / 'marker'}"
    engine_run = EngineRun(tmp_path / "out", prompts)
    report = engine_run.run()
    engine_run.assert_accounted(30)
    assert 3 <= report.deaths <= 4  # a worker may die with both of them at once
    reason = "3 workers died over this row, the last with no other row: "
    assert engine_run.rows()["30"]["error"] == f"{reason}{cause}"


@pytest.mark.promises
def test_a_worker_that_hangs_is_killed_and_its_row_fails(tmp_path: Path) -> None:
    prompts = ["a"] * 40
    prompts[17] = "hang"
    engine_run = EngineRun(tmp_path / "out", prompts, timeouts=Timeouts(start=5, least=5, factor=1))
    report = engine_run.run()
    engine_run.assert_accounted(17)
    assert report.deaths == 3
    assert "no heartbeat for 5 s" in engine_run.rows()["17"]["error"]


@pytest.mark.promises
def test_a_suspended_worker_is_replaced(tmp_path: Path) -> None:
    """Only another process can detect that a process was suspended with SIGSTOP."""
    engine_run = EngineRun(tmp_path / "out", ["a"] * 64, load=dummies.load_waiting, timeouts=Timeouts(3600, 30, 5, 2))
    stopped: list[int] = []

    def freeze() -> bool:
        if engine_run.committed and not stopped:
            stopped.append(int(str(engine_run.committed[0].worker).split("-")[-2]))
            os.kill(stopped[0], signal.SIGSTOP)
        return False

    report = engine_run.run(freeze)
    engine_run.assert_accounted()
    assert report.deaths == 1
    assert not Path(f"/proc/{stopped[0]}").exists()


@pytest.mark.promises
@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("die by SIGKILL", WorkersLostError, "no worker is left: the last one died .killed by SIGKILL"),
        ("raise fault", WorkerCrashError, "(?s)Traceback.*RuntimeError: the device said fault"),
    ],
)
def test_a_worker_that_always_dies_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, error: type[Exception], message: str
) -> None:
    """Otherwise, all rows of the table would fail one by one. A bug is raised with its traceback."""
    monkeypatch.setattr(supervisor, "MAX_FAILURES", 2)
    engine_run = EngineRun(tmp_path / "out", [prompt] * 100, processes=1)
    with pytest.raises(error, match=message):
        engine_run.run()
    assert not engine_run.committed
    log = (tmp_path / "out" / "logs" / "worker-0.log").read_text()
    assert log.count("RuntimeError: the device said fault") == (2 if error is WorkerCrashError else 0)


@pytest.mark.promises
def test_a_worker_that_dies_while_loading_ends_the_run_with_its_error(tmp_path: Path) -> None:
    with pytest.raises(WorkerCrashError, match="no such weights"):
        EngineRun(tmp_path / "out", ["a"] * 10, load=dummies.load_broken).run()
    with pytest.raises(ModelError, match=r"worker \d died while it loaded the model .killed by SIGKILL"):
        EngineRun(tmp_path / "out", ["a"] * 10, load=dummies.load_dying).run()
    assert not Manifest(tmp_path / "out").parts()


@pytest.mark.promises
def test_a_worker_that_was_killed_while_loading_is_started_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    engine_run = EngineRun(tmp_path / "out", ["a"] * 10, processes=1, load=dummies.load_dying_once)
    assert engine_run.run().deaths == 1
    engine_run.assert_accounted()


@pytest.mark.promises
def test_a_stop_commits_only_finished_rows(tmp_path: Path) -> None:
    engine_run = EngineRun(tmp_path / "out", ["a"] * 5000, load=dummies.load_waiting)
    engine_run.run(lambda: len(engine_run.committed) > 20)
    assert 20 < len(engine_run.committed) < 5000
    assert {row.id for row in engine_run.committed} == engine_run.rows().keys()


@pytest.mark.promises
def test_a_storage_error_ends_the_run(tmp_path: Path) -> None:
    """The path of the folder for images is a file."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images").write_text("")
    with pytest.raises(StorageError, match="images"):
        EngineRun(tmp_path / "out", ["a"] * 10).run()


def test_a_missing_device_is_refused_before_anything_is_rendered() -> None:
    with LocalEngine("cuda", 1) as engine, pytest.raises(SettingsError, match="torch finds no CUDA device"):
        engine.detect_device()


@pytest.mark.promises
@pytest.mark.parametrize("end", ["left", "killed"])
def test_workers_end_with_their_parent(end: str) -> None:
    with LocalEngine("cpu", 1, load=dummies.load) as engine:
        engine.detect_device()
        (worker,) = engine.start(1)
        process = worker._process
        assert process is not None and process.is_alive()
        if end == "killed":  # as the worker sees it
            shut_down(worker._connection)
            process.join(300)
            assert process.exitcode == 1
    assert not process.is_alive()


def with_subclasses(error_class: type[BatchInferError]) -> Iterator[type[BatchInferError]]:
    yield error_class
    for subclass in error_class.__subclasses__():
        yield from with_subclasses(subclass)


ERRORS = sorted({error for error in with_subclasses(BatchInferError) if hasattr(errors, error.__name__)}, key=str)


@pytest.mark.parametrize("error_class", ERRORS, ids=lambda error_class: error_class.__name__)
def test_an_error_of_a_worker_keeps_its_text_and_exit_code(error_class: type[BatchInferError]) -> None:
    error_message = WorkerError(error_class.__name__, "the text", "the traceback")
    error = WorkerHandle.exit_error(cast(WorkerHandle, SimpleNamespace(error=error_message)), "the cause")
    assert isinstance(error, BatchInferError)
    assert (str(error), error.exit_code) == ("the text", error_class.exit_code)
