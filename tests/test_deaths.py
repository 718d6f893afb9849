"""Test that the same command completes a run after kills and signals, with the images of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.deaths import (
    Killer,
    eventually,
    is_alive,
    render_undisturbed,
    without_bookkeeping,
    workers_of,
    write_prompts,
)
from tests.paced import MODULE
from tests.runs import assert_whole, command, hashes, images, results, run, run_json, start, wait_for
from tests.tables import write_csv

SEED = int(os.environ.get("SEED", "0"))
"""Seed of all random choices, which the environment variable SEED can set."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def check_random_kills(folder: Path, rows: int, kills: int, seed: int) -> None:
    table, out = write_prompts(folder, rows), folder / "out"
    options = ("--slots", "16", "--num-processes", "2")
    killer = Killer(table, out, options, random.Random(seed))
    killer.kill(kills)
    print(f"seed {seed}: {killer.killed}")
    done = run(table, out, *options)
    assert done.code == 0, done.stderr
    assert without_bookkeeping(out) == render_undisturbed(table, folder / "reference")
    assert hashes(out) == hashes(folder / "reference")
    assert_whole(out)


@pytest.mark.promises
def test_random_kills_change_nothing(tmp_path: Path) -> None:
    check_random_kills(tmp_path, rows=30, kills=1, seed=SEED)


@pytest.mark.promises
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_is_replaced_and_changes_nothing(tmp_path: Path) -> None:
    table, out = write_prompts(tmp_path, 10), tmp_path / "out"
    options = ("--slots", "16", "--num-processes", "1")
    with start(table, out, *options, program=MODULE, PACE_SECONDS="0.5") as process:
        assert wait_for(process, lambda: any((out / "manifest").glob("part-*.parquet")))
        (worker,) = workers_of(process.pid)
        os.kill(worker, signal.SIGKILL)
        assert process.wait() == 0
    assert run_json(out)["summary"]["deaths"] == 1
    assert without_bookkeeping(out) == render_undisturbed(table, tmp_path / "reference")
    assert_whole(out)


@pytest.mark.soak
def test_thirty_random_kills_change_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with capfd.disabled():
        print(f"\nseed {SEED} (SEED=N sets another)")
    check_random_kills(tmp_path, rows=600, kills=30, seed=SEED)


@pytest.mark.promises
def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    table = write_prompts(tmp_path, 20)
    expected = render_undisturbed(table, tmp_path / "0")
    for processes in ("1", "2"):
        done = run(table, tmp_path / processes, "--slots", "16", "--num-processes", processes)
        assert done.code == 0, done.stderr
        assert without_bookkeeping(tmp_path / processes) == expected
        assert len({row["worker"] for row in results(tmp_path / processes)}) <= int(processes)


DUMMY = """
import batch_infer.jobs.run as jobs
from batch_infer.engines.local import LocalEngine
from batch_infer.__main__ import main
from tests import dummies
jobs.make_engine = lambda *_: LocalEngine("cpu", 2, load=dummies.load_waiting)
main()
"""
"""Run the command with two slow workers and a model that loads instantly."""


@pytest.mark.promises
def test_output_of_libraries_in_a_worker_goes_to_its_log(tmp_path: Path) -> None:
    table, out = write_csv(tmp_path / "t.csv", [["prompt"], ["a red circle"]]), tmp_path / "out"
    with start(table, out, "-q", program=("-c", DUMMY.replace("load_waiting", "load_noisy"))) as process:
        stdout, stderr = process.communicate(timeout=600)
    assert (process.returncode, stdout, stderr) == (0, "", "")
    logs = "".join(log.read_text() for log in (out / "logs").glob("worker-*.log"))
    assert all(word in logs for word in ("on stdout", "on stderr", "by C", "old settings", "advice"))


def write_many_prompts(folder: Path) -> Path:
    return write_csv(folder / "many.csv", [["prompt"], *(["a red circle"] for _ in range(3000))])


@pytest.mark.promises
@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_all_processes_stops_a_run(tmp_path: Path, number: int) -> None:
    """systemd and terminals signal each process of the group. Finished rows are committed."""
    table, out = write_many_prompts(tmp_path), tmp_path / "out"
    with start(table, out, program=("-c", DUMMY), session=True) as process:
        assert eventually(lambda: any((out / "manifest").glob("part-*")))
        os.killpg(process.pid, number)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 75, stderr
    assert command("merge", out).code == 0  # a slow machine may have had no time to merge
    assert 0 < len([row for row in results(out) if row["status"] == "ok"]) < 3000
    assert_whole(out)


@pytest.mark.promises
@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_all_processes_while_workers_start_stops_a_run(tmp_path: Path, number: int) -> None:
    table, out = write_many_prompts(tmp_path), tmp_path / "out"
    with start(table, out, program=("-c", DUMMY), session=True) as process:
        assert eventually(lambda: bool(workers_of(process.pid)))
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    assert not images(out)


@pytest.mark.promises
def test_a_second_interrupt_ends_a_run_and_its_workers_at_once(tmp_path: Path) -> None:
    table, out = write_many_prompts(tmp_path), tmp_path / "out"
    impatient = "from batch_infer import stopping\nstopping.REPEAT_SECONDS = 0.0"  # so that no two signals count as one
    with start(table, out, program=("-c", impatient + DUMMY)) as process:
        assert eventually(lambda: any((out / "manifest").glob("part-*")))
        workers = workers_of(process.pid)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)  # so that the first signal is not enough
        process.send_signal(signal.SIGINT)
        line = process.stderr.readline() if process.stderr else ""
        while "stopping" not in line:
            line = process.stderr.readline() if process.stderr else ""
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 75, stderr
    assert "stopped by SIGINT" in stderr
    assert eventually(lambda: not any(map(is_alive, workers)))


@pytest.mark.promises
def test_a_removed_out_ends_the_run_and_is_not_created_again(tmp_path: Path) -> None:
    table, out = write_many_prompts(tmp_path), tmp_path / "out"
    with start(table, out, program=("-c", DUMMY)) as process:
        assert eventually(lambda: any((out / "manifest").glob("part-*")))
        out.rename(tmp_path / "elsewhere")
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 75, stderr
    assert str(out) in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert not out.exists()


@pytest.mark.promises
def test_a_run_repairs_parts_and_images_that_a_crash_has_damaged(tmp_path: Path) -> None:
    """An image is truncated, another is missing, a part is not Parquet, and a temporary file is left over."""
    table, out = write_prompts(tmp_path, 24), tmp_path / "out"
    expected = render_undisturbed(table, out)
    shutil.copytree(out, tmp_path / "reference")
    record = (out / "run.json").read_text().replace('"summary": {', '"ended": {')  # as if the run had been killed
    (out / "run.json").write_text(record.rstrip().removesuffix("}") + ', "summary": null}')
    first, second, *_ = (row["generated_image"] for row in results(out))
    (out / first).write_bytes((out / first).read_bytes()[:200])
    (out / second).unlink()
    (out / "images" / ".tmp-0a1b2c3d-1-0123456789ab-y.png").write_bytes(b"half")
    (out / "manifest" / "part-0.parquet").write_bytes(b"PAR1")
    (out / "results.parquet").unlink()
    done = run(table, out, "--slots", "16")
    assert done.code == 0, done.stderr
    assert "2 committed images are missing or damaged" in done.stderr
    assert "part-0.parquet is damaged" in done.stderr
    assert without_bookkeeping(out) == expected
    assert hashes(out) == hashes(tmp_path / "reference")
    assert_whole(out)


@pytest.mark.promises
def test_rows_of_a_damaged_part_are_rendered_again(tmp_path: Path) -> None:
    table, out = write_prompts(tmp_path, 6), tmp_path / "out"
    expected = render_undisturbed(table, out)
    part = min((out / "manifest").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-100])
    refused = command("merge", out)
    assert refused.code == 2
    assert "run again to set it aside" in refused.stderr
    done = run(table, out, "--slots", "16")
    assert done.code == 0, done.stderr
    assert without_bookkeeping(out) == expected
    assert_whole(out)
