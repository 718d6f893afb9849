"""Runs under a launcher of the user's own, on one node and on two, with its ranks killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path

import pytest

from batch_infer.engines.launched import MEETING, Launched, Place, find_rank_0, place
from batch_infer.errors import SettingsError
from tests.deaths import eventually, table_of, undisturbed, without_bookkeeping
from tests.paced import MODULE
from tests.runs import QUICK, assert_whole, hashes, results, run

OURS = ("--slots", "16")
LAUNCHED = tuple(option for option in QUICK if option not in ("--num-processes", "0"))
TORCHRUN = ("torch.distributed.run",)
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no")  # fmt: skip
"""On a machine without a GPU it is this option by which it starts several processes."""


@contextmanager
def launched(
    table: Path, out: Path, *launcher: str, program: Sequence[str] = ("-m", "batch_infer"), **environment: str
) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-m", *launcher, *program, "run", str(table), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [*line, *LAUNCHED, *OURS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def assert_as_expected(out: Path, reference: Path) -> None:
    assert without_bookkeeping(out) == without_bookkeeping(reference)
    assert hashes(out) == hashes(reference)
    assert_whole(out)


def meeting_of(folder: Path, workers: int) -> dict[str, str]:
    """Have each of so many workers come to work, however long they take to start."""
    return {"PACE_MEET": str(folder / "meeting"), "PACE_WORKERS": str(workers), "PACE_SECONDS": "0.2"}


@pytest.mark.promises
def test_torchrun_starts_the_workers(tmp_path: Path) -> None:
    table = table_of(tmp_path, 24)
    undisturbed(table, tmp_path / "reference")
    with launched(table, tmp_path / "out", *TORCHRUN, "--standalone", "--nproc-per-node", "2") as process:
        stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert stdout.count("24 rows") == 1
    assert_as_expected(tmp_path / "out", tmp_path / "reference")
    assert not (tmp_path / "out" / MEETING).exists()


@pytest.mark.promises
def test_accelerate_starts_the_workers(tmp_path: Path) -> None:
    table = table_of(tmp_path, 24)
    undisturbed(table, tmp_path / "reference")
    together = meeting_of(tmp_path, 3)
    with launched(table, tmp_path / "out", *ACCELERATE, "--num_processes", "3", program=MODULE, **together) as process:
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert len({row["worker"] for row in results(tmp_path / "out")}) == 3
    assert_as_expected(tmp_path / "out", tmp_path / "reference")


@pytest.mark.promises
def test_two_nodes_share_the_rows(tmp_path: Path) -> None:
    table = table_of(tmp_path, 24)
    undisturbed(table, tmp_path / "reference")
    together = meeting_of(tmp_path, 2)
    meeting = f"--master-port={free_port()}"
    node = (*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", meeting)
    first = launched(table, tmp_path / "out", *node, "--node-rank", "0", program=MODULE, **together)
    second = launched(table, tmp_path / "out", *node, "--node-rank", "1", program=MODULE, **together)
    with first as here, second as there:
        _, stderr = here.communicate(timeout=600)
        assert here.returncode == 0, stderr
        assert there.wait(600) == 0
    assert len({row["worker"] for row in results(tmp_path / "out")}) == 2
    assert_as_expected(tmp_path / "out", tmp_path / "reference")


@pytest.mark.promises
def test_a_launcher_that_starts_all_again_loses_nothing(tmp_path: Path) -> None:
    """It does so where one of its ranks has died."""
    table, out = table_of(tmp_path, 24), tmp_path / "out"
    undisturbed(table, tmp_path / "reference")
    node = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    with launched(table, out, *node, program=MODULE, PACE_SECONDS="0.3") as process:
        assert eventually(lambda: any((out / "manifest").glob("part-*")))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert_as_expected(out, tmp_path / "reference")


@pytest.mark.promises
def test_a_rank_that_is_asked_to_stop_leaves_its_rows_to_the_others(tmp_path: Path) -> None:
    """As where one of several nodes is taken away."""
    table, out = table_of(tmp_path, 24), tmp_path / "out"
    undisturbed(table, tmp_path / "reference")
    node = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
    with launched(table, out, *node, program=MODULE, PACE_SECONDS="0.3") as process:
        assert eventually(lambda: any((out / "manifest").glob("part-*")))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert_as_expected(out, tmp_path / "reference")


def test_strangers_at_the_meeting_place_keep_nobody_out(tmp_path: Path) -> None:
    """One who goes at once, one who says nothing, and one who does not know the key."""
    here = Place(0, 2, 0, 2, "127.0.0.1", "this launch")
    (tmp_path / "out").mkdir()
    with Launched("cpu", here, tmp_path / "out") as engine:
        address = json.loads((tmp_path / "out" / MEETING).read_text())["address"]
        socket.create_connection(address).close()
        with socket.create_connection(address), pytest.raises((AuthenticationError, EOFError, OSError)):
            Client(tuple(address), authkey=b"wrong")
        with meet(tmp_path / "out", "this launch") as link:
            link.send(1)
            assert eventually(lambda: any(peer.rank == 1 for peer in engine.newcomers()))


def meet(out: Path, launch: str) -> Connection:
    link = find_rank_0(out, launch, lambda: False)
    assert link is not None
    return link


def test_the_note_of_another_launch_is_not_followed(tmp_path: Path) -> None:
    note = {"launch": "another", "address": ["127.0.0.1", free_port()], "key": ""}
    (tmp_path / MEETING).write_text(json.dumps(note))
    answers = iter([False, False, True])
    assert find_rank_0(tmp_path, "this launch", lambda: next(answers)) is None


def test_a_place_is_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place() is None
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node-0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(3, 4, 1, 2, "node-0", launch="  ")
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SettingsError, match="WORLD_SIZE"):
        place()


def test_a_launcher_and_another_number_of_processes_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    done = run(table_of(tmp_path, 2), tmp_path / "out", "--num-processes", "3")
    assert done.code == 2
    assert "--num-processes 3: a launcher has started 2" in done.stderr
