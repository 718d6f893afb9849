"""Engines: workers in processes of their own, which die in every way, and rows that are accounted for all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from batch_infer import errors
from batch_infer.engines import supervisor
from batch_infer.engines.handle import Timeouts, WorkerCrash, WorkerHandle, shut_down
from batch_infer.engines.local import LocalEngine
from batch_infer.engines.messages import WorkerError
from batch_infer.engines.protocol import WorkersLost
from batch_infer.errors import BatchInferError, ModelError, SettingsError, StorageError
from batch_infer.manifest import Manifest
from tests import dummies
from tests.crew import Rendering
from tests.tables import write_csv


@pytest.mark.promises
def test_two_workers_share_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEET", str(tmp_path / "meeting"))
    rendering = Rendering(tmp_path / "out", ["a"] * 200, load=dummies.load_together)
    work = rendering.go()
    rendering.assert_accounted()
    assert (work.processes, work.deaths) == (2, 0)
    assert len({row.worker for row in rendering.told}) == 2
    assert sum(account.total.images for account in work.worker_reports) == 200
    assert not list((tmp_path / "out").rglob(".*"))


@pytest.mark.promises
@pytest.mark.parametrize(
    ("prompt", "fate"),
    [
        ("die by SIGKILL", "killed by SIGKILL"),
        ("raise hell", "RuntimeError: the device said hell"),
    ],
)
def test_a_row_that_its_process_dies_of_costs_no_other(tmp_path: Path, prompt: str, fate: str) -> None:
    """It is tried three times, the last time alone. What was a passing fault costs nothing."""
    prompts = ["a"] * 200
    prompts[30], prompts[150] = prompt, f"die once {tmp_path / 'marker'}"
    rendering = Rendering(tmp_path / "out", prompts)
    work = rendering.go()
    rendering.assert_accounted(30)
    assert 3 <= work.deaths <= 4  # a worker may die with both of them at once
    told = "3 workers died over this row, the last with no other row: "
    assert rendering.rows()["30"]["error"] == f"{told}{fate}"


@pytest.mark.promises
def test_a_worker_that_hangs_is_ended_and_its_row_with_it(tmp_path: Path) -> None:
    prompts = ["a"] * 40
    prompts[17] = "hang"
    rendering = Rendering(tmp_path / "out", prompts, timeouts=Timeouts(start=5, least=5, factor=1))
    work = rendering.go()
    rendering.assert_accounted(17)
    assert work.deaths == 3
    assert "no heartbeat for 5 s" in rendering.rows()["17"]["error"]


@pytest.mark.promises
def test_a_worker_that_is_stopped_from_outside_is_replaced(tmp_path: Path) -> None:
    """A process under SIGSTOP cannot watch itself."""
    rendering = Rendering(tmp_path / "out", ["a"] * 64, load=dummies.load_waiting, timeouts=Timeouts(3600, 30, 5, 2))
    stopped: list[int] = []

    def freeze() -> bool:
        if rendering.told and not stopped:
            stopped.append(int(str(rendering.told[0].worker).split("-")[-2]))
            os.kill(stopped[0], signal.SIGSTOP)
        return False

    work = rendering.go(freeze)
    rendering.assert_accounted()
    assert work.deaths == 1
    assert not Path(f"/proc/{stopped[0]}").exists()


@pytest.mark.promises
@pytest.mark.parametrize(
    ("prompt", "error", "told"),
    [
        ("die by SIGKILL", WorkersLost, "no worker is left: the last one died .killed by SIGKILL"),
        ("raise hell", WorkerCrash, "(?s)Traceback.*RuntimeError: the device said hell"),
    ],
)
def test_a_worker_that_dies_whatever_it_does_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, error: type[Exception], told: str
) -> None:
    """Or it would take all rows of the table with it, one by one. A bug is told as one."""
    monkeypatch.setattr(supervisor, "MAX_FAILURES", 2)
    rendering = Rendering(tmp_path / "out", [prompt] * 100, processes=1)
    with pytest.raises(error, match=told):
        rendering.go()
    assert not rendering.told
    log = (tmp_path / "out" / "logs" / "worker-0.log").read_text()
    assert log.count("RuntimeError: the device said hell") == (2 if error is WorkerCrash else 0)


@pytest.mark.promises
def test_a_worker_that_dies_at_its_start_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(WorkerCrash, match="no such weights"):
        Rendering(tmp_path / "out", ["a"] * 10, load=dummies.load_broken).go()
    with pytest.raises(ModelError, match=r"worker \d died while it loaded the model .killed by SIGKILL"):
        Rendering(tmp_path / "out", ["a"] * 10, load=dummies.load_dying).go()
    assert not Manifest(tmp_path / "out").parts()


@pytest.mark.promises
def test_a_worker_that_was_killed_while_it_loaded_has_a_second_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    rendering = Rendering(tmp_path / "out", ["a"] * 10, processes=1, load=dummies.load_dying_once)
    assert rendering.go().deaths == 1
    rendering.assert_accounted()


@pytest.mark.promises
def test_a_stop_commits_what_is_finished_and_leaves_the_rest(tmp_path: Path) -> None:
    rendering = Rendering(tmp_path / "out", ["a"] * 5000, load=dummies.load_waiting)
    rendering.go(lambda: len(rendering.told) > 20)
    assert 20 < len(rendering.told) < 5000
    assert {row.id for row in rendering.told} == rendering.rows().keys()


@pytest.mark.promises
def test_a_disk_that_is_full_ends_the_run_in_order(tmp_path: Path) -> None:
    """A file stands where the images' folder is to be."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images").write_text("")
    with pytest.raises(StorageError, match="images"):
        Rendering(tmp_path / "out", ["a"] * 10).go()


def test_a_device_that_is_not_there_is_told_before_anything_is_rendered() -> None:
    with LocalEngine("cuda", 1) as engine, pytest.raises(SettingsError, match="torch finds no CUDA device"):
        engine.find_device()


UNGUARDED = """
import sys
from pathlib import Path
from batch_infer.jobs import make_plan, render_tables
from batch_infer.models import DEMO_MODEL
from batch_infer.cli.progress import make_progress
from batch_infer.settings import ComputeSettings, ModelSettings, RunSettings, TableSettings
folder = Path(sys.argv[1])
settings = RunSettings(TableSettings((str(folder / "t.csv"),)), folder / "out", model=ModelSettings(device="cpu"),
                       compute=ComputeSettings(processes=1))
if sys.argv[2] == "run":
    render_tables(settings, make_progress(shown=False))
else:
    make_plan(settings, print)
"""


@pytest.mark.promises
@pytest.mark.parametrize("job", ["run", "plan"])
def test_a_script_without_a_main_guard_is_told_what_to_write(tmp_path: Path, job: str) -> None:
    write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]])
    (tmp_path / "script.py").write_text(UNGUARDED)
    line = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), job]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("batch_infer.errors.SettingsError: the script that calls")
    assert 'put the call under `if __name__ == "__main__":`' in done.stderr


@pytest.mark.promises
@pytest.mark.parametrize("end", ["left", "killed"])
def test_workers_end_when_their_parent_does(end: str) -> None:
    with LocalEngine("cpu", 1, load=dummies.load) as engine:
        engine.find_device()
        (peer,) = engine.start(1)
        process = peer._process
        assert process is not None and process.is_alive()
        if end == "killed":  # as it looks from the other end of the link
            shut_down(peer._connection)
            process.join(300)
            assert process.exitcode == 1
    assert not process.is_alive()


def kinds_of(kind: type[BatchInferError]) -> Iterator[type[BatchInferError]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from kinds_of(inner)


NAMED = sorted({kind for kind in kinds_of(BatchInferError) if hasattr(errors, kind.__name__)}, key=str)


@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: kind.__name__)
def test_an_error_of_a_worker_keeps_its_sentence_and_its_exit_code(kind: type[BatchInferError]) -> None:
    broken = WorkerError(kind.__name__, "the sentence", "the traceback")
    error = WorkerHandle.exit_error(cast(WorkerHandle, SimpleNamespace(error=broken)), "its fate")
    assert isinstance(error, BatchInferError)
    assert (str(error), error.exit_code) == ("the sentence", kind.exit_code)
