"""Test runs under torchrun and accelerate, on one node and on two, with ranks that are killed or stopped."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest

from batch_infer.engines import dial_in
from batch_infer.engines import launched as launched_module
from batch_infer.engines.launched import LaunchedEngine, RankInfo, connect_to_rank_0, read_rank_info
from batch_infer.engines.messages import Hello, encode
from batch_infer.engines.rendezvous import (
    FILE_NAME,
    SECRET,
    Rendezvous,
    TrustedRendezvous,
    read_rendezvous,
    write_rendezvous,
)
from batch_infer.errors import ServiceError, SettingsError
from batch_infer.store import LocalStore
from tests.deaths import eventually, render_undisturbed, without_bookkeeping, write_prompts
from tests.paced import MODULE
from tests.runs import QUICK, assert_whole, hashes, results, run

OPTIONS = (*(option for option in QUICK if option not in ("--num-processes", "0")), "--slots", "16")
TORCHRUN = ("torch.distributed.run",)
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no")  # fmt: skip
"""--multi_gpu makes accelerate start several processes, even on a machine without a GPU."""


@contextmanager
def launched(
    table: Path, out: Path, *launcher: str, program: Sequence[str] = ("-m", "batch_infer"), **environment: str
) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-m", *launcher, *program, "run", str(table), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [*line, *OPTIONS],
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


def assert_equal_results(out: Path, reference: Path) -> None:
    assert without_bookkeeping(out) == without_bookkeeping(reference)
    assert hashes(out) == hashes(reference)
    assert_whole(out)


def meeting_environment(folder: Path, workers: int) -> dict[str, str]:
    """Return variables that make each worker wait after its first image until all workers have rendered one."""
    return {"PACE_MEET": str(folder / "meeting"), "PACE_WORKERS": str(workers), "PACE_SECONDS": "0.2"}


@pytest.mark.promises
def test_torchrun_starts_the_workers(tmp_path: Path) -> None:
    table = write_prompts(tmp_path, 24)
    render_undisturbed(table, tmp_path / "reference")
    with launched(table, tmp_path / "out", *TORCHRUN, "--standalone", "--nproc-per-node", "2") as process:
        stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert stdout.count("24 rows") == 1
    assert_equal_results(tmp_path / "out", tmp_path / "reference")
    assert not (tmp_path / "out" / FILE_NAME).exists()


@pytest.mark.promises
def test_accelerate_starts_the_workers(tmp_path: Path) -> None:
    table = write_prompts(tmp_path, 24)
    render_undisturbed(table, tmp_path / "reference")
    paced = meeting_environment(tmp_path, 3)
    with launched(table, tmp_path / "out", *ACCELERATE, "--num_processes", "3", program=MODULE, **paced) as process:
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert len({row["worker"] for row in results(tmp_path / "out")}) == 3
    assert_equal_results(tmp_path / "out", tmp_path / "reference")


@pytest.mark.promises
def test_two_nodes_share_the_rows(tmp_path: Path) -> None:
    table = write_prompts(tmp_path, 24)
    render_undisturbed(table, tmp_path / "reference")
    paced = meeting_environment(tmp_path, 2)
    port = f"--master-port={free_port()}"
    node = (*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", port)
    first = launched(table, tmp_path / "out", *node, "--node-rank", "0", program=MODULE, **paced)
    second = launched(table, tmp_path / "out", *node, "--node-rank", "1", program=MODULE, **paced)
    with first as here, second as there:
        _, stderr = here.communicate(timeout=600)
        assert here.returncode == 0, stderr
        assert there.wait(600) == 0
    assert len({row["worker"] for row in results(tmp_path / "out")}) == 2
    assert_equal_results(tmp_path / "out", tmp_path / "reference")


@pytest.mark.promises
def test_no_row_is_lost_when_a_launcher_restarts_all_ranks(tmp_path: Path) -> None:
    """A launcher restarts all ranks after one of them has died."""
    table, out = write_prompts(tmp_path, 24), tmp_path / "out"
    render_undisturbed(table, tmp_path / "reference")
    node = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    with launched(table, out, *node, program=MODULE, PACE_SECONDS="0.3") as process:
        assert eventually(lambda: any((out / "manifest").glob("part-*")))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert_equal_results(out, tmp_path / "reference")


@pytest.mark.promises
def test_other_ranks_render_the_rows_of_a_rank_that_is_stopped(tmp_path: Path) -> None:
    """This happens when one of several nodes is removed."""
    table, out = write_prompts(tmp_path, 24), tmp_path / "out"
    render_undisturbed(table, tmp_path / "reference")
    node = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
    with launched(table, out, *node, program=MODULE, PACE_SECONDS="0.3") as process:
        assert eventually(lambda: any((out / "manifest").glob("part-*")))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert_equal_results(out, tmp_path / "reference")


def test_other_connections_do_not_block_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is closed at once, one stays silent, one does not know the key, and some send invalid bytes."""
    monkeypatch.setattr(dial_in, "HANDSHAKE_SECONDS", 0.5)
    rank_info = RankInfo(0, 2, 0, 2, "127.0.0.1", "this launch")
    (tmp_path / "out").mkdir()
    with LaunchedEngine("cpu", rank_info, LocalStore(tmp_path / "out")) as engine:
        content = json.loads((tmp_path / "out" / FILE_NAME).read_text())
        address = content["host"], content["port"]
        socket.create_connection(address).close()
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x10" + b"x" * 16):
            with socket.create_connection(address) as idle:
                idle.sendall(garbage)
                idle.settimeout(60)
                with suppress(ConnectionResetError):
                    while idle.recv(1024):  # until it is closed
                        pass
        with pytest.raises((AuthenticationError, EOFError, OSError)):
            Client(address, authkey=b"wrong")
        with connect(tmp_path / "out", "this launch") as connection:
            connection.send(Danger(tmp_path / "harm"))
            with pytest.raises((EOFError, OSError)):
                connection.recv_bytes()
        with connect(tmp_path / "out", "this launch") as connection:
            connection.send_bytes(encode(Hello(1)))
            assert eventually(lambda: any(worker.rank == 1 for worker in engine.arrivals()))
    assert not (tmp_path / "harm").exists()


class Danger:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return os.mkdir, (self._path,)


def test_a_rendezvous_file_must_be_written_by_this_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = Rendezvous("launch", "127.0.0.1", 1, "00")
    write_rendezvous(LocalStore(tmp_path), own)
    trusted = read_rendezvous(LocalStore(tmp_path))
    assert isinstance(trusted, TrustedRendezvous)
    assert trusted.rendezvous == own
    (tmp_path / FILE_NAME).chmod(0o644)
    assert "is ignored" in str(read_rendezvous(LocalStore(tmp_path)))
    (tmp_path / FILE_NAME).chmod(0o600)
    (tmp_path / FILE_NAME).rename(tmp_path / "other")
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "other")
    assert "is ignored" in str(read_rendezvous(LocalStore(tmp_path)))
    stops = iter([False, False, True])
    with caplog.at_level(logging.WARNING, "batch_infer"):
        assert connect_to_rank_0(LocalStore(tmp_path), "launch", lambda: next(stops)) is None
    assert "is ignored" in caplog.text
    (tmp_path / FILE_NAME).unlink()
    os.mkfifo(tmp_path / FILE_NAME, 0o600)
    assert "is ignored" in str(read_rendezvous(LocalStore(tmp_path)))


def test_a_silent_server_on_the_port_of_a_killed_rank_0_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial_in, "HANDSHAKE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        write_rendezvous(LocalStore(tmp_path), Rendezvous("launch", "127.0.0.1", silent.getsockname()[1], "00"))
        stops = iter([False, False, True])
        assert connect_to_rank_0(LocalStore(tmp_path), "launch", lambda: next(stops)) is None


def test_a_rendezvous_file_of_another_user_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is trusted if the ranks share a secret in their environment."""
    rendezvous = Rendezvous("launch", "127.0.0.1", 1, "00")
    write_rendezvous(LocalStore(tmp_path), rendezvous)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert "is ignored" in str(read_rendezvous(LocalStore(tmp_path)))
    with pytest.raises(SettingsError, match=f"does not store owners and modes of files.*set {SECRET}"):
        write_rendezvous(LocalStore(tmp_path), rendezvous)
    assert not (tmp_path / FILE_NAME).exists(), "it contains the key"
    monkeypatch.setenv(SECRET, "of all ranks")
    key = write_rendezvous(LocalStore(tmp_path), rendezvous)
    assert json.loads((tmp_path / FILE_NAME).read_text())["key"] == ""
    trusted = read_rendezvous(LocalStore(tmp_path))
    assert isinstance(trusted, TrustedRendezvous)
    assert trusted.key == key


class StoreWithoutOwners(LocalStore):
    """Keeps no owners and modes, like a store of objects."""

    keeps_file_owners = False

    def write_private(self, name: str, content: bytes) -> bool:
        super().write_private(name, content)
        return False


def test_a_key_is_not_stored_where_all_may_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listeners: list[socket.socket] = []
    real_listen = launched_module._listen

    def listen(rank_info: RankInfo) -> socket.socket:
        listeners.append(real_listen(rank_info))
        return listeners[-1]

    monkeypatch.setattr(launched_module, "_listen", listen)
    store = StoreWithoutOwners(tmp_path)
    engine = LaunchedEngine("cpu", RankInfo(0, 2, 0, 2, "127.0.0.1", "launch"), store)
    monkeypatch.setattr(StoreWithoutOwners, "write_private", lambda *_: pytest.fail("the key was stored"))
    with pytest.raises(SettingsError, match=f"set {SECRET} to the same random text for all ranks"):
        engine.__enter__()
    assert [listener.fileno() for listener in listeners] == [-1], "it is closed"
    monkeypatch.undo()
    monkeypatch.setenv(SECRET, "of all ranks")
    write_rendezvous(store, Rendezvous("launch", "127.0.0.1", 1, "00"))
    assert json.loads((tmp_path / FILE_NAME).read_text())["key"] == ""


@pytest.mark.parametrize("skew", [0.0, -3600.0, 3600.0], ids=["", "slow server", "fast server"])
def test_a_rank_that_starts_after_rank_0_has_ended_does_not_wait(
    skew: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the file server may differ from this machine's."""
    touch = Path.touch

    def touch_by_server(path: Path, *args: Any, **kwargs: Any) -> None:
        touch(path, *args, **kwargs)
        os.utime(path, (time.time() + skew,) * 2)

    monkeypatch.setattr(Path, "touch", touch_by_server)
    monkeypatch.setattr(launched_module, "LATE_SECONDS", 0.0)
    with LaunchedEngine("cpu", RankInfo(0, 2, 0, 2, "127.0.0.1", "this launch"), LocalStore(tmp_path)):
        pass
    file = tmp_path / FILE_NAME
    os.utime(file, (file.stat().st_mtime + skew,) * 2)
    assert connect_to_rank_0(LocalStore(tmp_path), "this launch", lambda: False) is None
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    monkeypatch.setattr(launched_module, "ARRIVAL_SECONDS", 0.0)
    monkeypatch.setattr(launched_module, "PROCESS_START", time.monotonic() + 60)
    with pytest.raises(ServiceError, match="rank 0 was not found"):  # the file is from an earlier launch
        connect_to_rank_0(LocalStore(tmp_path), "this launch", lambda: False)


def test_an_unknown_master_address_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(SettingsError, match="MASTER_ADDR=nowhere.invalid: rank 0 cannot listen there"),
        LaunchedEngine("cpu", RankInfo(0, 2, 0, 2, "nowhere.invalid"), LocalStore(tmp_path)),
    ):
        pass
    write_rendezvous(LocalStore(tmp_path), Rendezvous("launch", "nowhere.invalid", 1, "00"))
    with pytest.raises(ServiceError, match="MASTER_ADDR=nowhere.invalid cannot be resolved on this machine"):
        connect_to_rank_0(LocalStore(tmp_path), "launch", lambda: False)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")
@pytest.mark.parametrize("local_world_size", [1, 2])
def test_a_master_address_may_be_ipv6(tmp_path: Path, local_world_size: int) -> None:
    rank_info = RankInfo(0, 2, 0, local_world_size, "::1", "launch")
    with LaunchedEngine("cpu", rank_info, LocalStore(tmp_path)) as engine, connect(tmp_path, "launch") as connection:
        connection.send_bytes(encode(Hello(1)))
        assert eventually(lambda: any(worker.rank == 1 for worker in engine.arrivals()))


def connect(out: Path, launch: str) -> Connection:
    connection = connect_to_rank_0(LocalStore(out), launch, lambda: False)
    assert connection is not None
    return connection


def test_a_rendezvous_of_another_launch_is_ignored(tmp_path: Path) -> None:
    write_rendezvous(LocalStore(tmp_path), Rendezvous("another", "127.0.0.1", free_port(), "00"))
    stops = iter([False, False, True])
    assert connect_to_rank_0(LocalStore(tmp_path), "this launch", lambda: next(stops)) is None


def test_rank_info_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_rank_info() is None
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node-0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_rank_info() == RankInfo(3, 4, 1, 2, "node-0", launch_id="  ")
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SettingsError, match="WORLD_SIZE"):
        read_rank_info()


def test_num_processes_must_agree_with_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    done = run(write_prompts(tmp_path, 2), tmp_path / "out", "--num-processes", "3")
    assert done.code == 2
    assert "--num-processes 3: a launcher has started 2" in done.stderr
