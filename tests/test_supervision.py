"""Supervision: which GPU a worker gets, how long a silent one is tolerated, and workers that do not fit together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from batch_infer.autotune import devices
from batch_infer.engines import Task, handle, launched, local, supervisor
from batch_infer.engines.handle import Timeouts, WorkerHandle
from batch_infer.engines.launched import RankInfo
from batch_infer.engines.ledger import MAX_DEATHS, Chunk
from batch_infer.engines.messages import (
    DeviceReport,
    Heartbeat,
    Hello,
    ModelLoaded,
    NoMoreRows,
    RowChunk,
    RowRequest,
    StartTask,
    StopTask,
    WorkerIdle,
    decode_from_worker,
    decode_to_worker,
    encode,
)
from batch_infer.engines.protocol import WorkersLost
from batch_infer.engines.supervisor import Supervisor
from batch_infer.engines.worker_process import LAUNCHER_NAMES, WorkerSpec, select_gpu
from batch_infer.errors import ModelError, SettingsError
from batch_infer.models import read_card
from batch_infer.records import ResultRow
from batch_infer.settings import Compute, Device, ModelSettings, OutputSettings, SafetySettings
from batch_infer.store import PinnedFolder
from batch_infer.worker import WorkerSettings
from tests.deaths import eventually
from tests.rendering import make_request

MIG = "MIG-11111111-aaaa,MIG-22222222-bbbb,MIG-33333333-cccc"
COMPUTE = Compute("cuda", "float16", 32, 8, 1, device_name="NVIDIA H200")


@pytest.mark.parametrize(
    ("visible", "gpu", "device", "seen"),
    [
        (None, 0, "auto", None),
        (None, 3, "auto", "3"),
        (None, 3, "cpu", None),
        ("4,5,6", 0, "auto", "4,5,6"),
        ("4,5,6", 2, "auto", "6"),
        ("4, 5", 1, "cuda", "5"),
        ("GPU-aa,GPU-bb", 1, "cuda", "GPU-bb"),
        (MIG, 2, "auto", "MIG-33333333-cccc"),
        ("7", 2, "auto", "7"),
        ("", 1, "auto", ""),
    ],
)
def test_each_worker_sees_the_gpu_of_its_rank(
    visible: str | None, gpu: int, device: str, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that has shown a process one GPU, or none, has decided: nothing is changed."""
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setattr("batch_infer.engines.worker_process.os.environ", environment)
    environment |= dict.fromkeys(LAUNCHER_NAMES, "1")
    select_gpu(WorkerSpec(gpu, gpu, device))
    assert environment == ({} if seen is None else {"CUDA_VISIBLE_DEVICES": seen})


@pytest.mark.parametrize(
    ("visible", "shown_by_cuda", "count"), [(None, 2, 2), ("0,1", 2, 2), (MIG, 1, 3), (MIG, 0, 0), ("MIG-1,0", 1, 1)]
)
def test_each_listed_mig_slice_is_a_device(
    visible: str | None, shown_by_cuda: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: shown_by_cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices._count_cuda_devices() == count


class Clock:
    """Stands still until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (handle, supervisor, local):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Pool:
    """Workers that a test plays: what they say is put into the pipes, and what they are told is read from them."""

    timeouts = Timeouts(load=3600, start=3600, least=600, factor=10)

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.peers, self.ends = [], []
        for rank in range(workers):
            connection, end = Pipe()
            self.peers.append(WorkerHandle(rank, connection))
            self.ends.append(end)

    def start(self, rows: int) -> Iterable[WorkerHandle]:
        return self.peers

    def arrivals(self) -> Iterable[WorkerHandle]:
        return ()

    def restart(self, rank: int) -> WorkerHandle | None:
        return None


def heard(end: Connection) -> list[Any]:
    """All that a worker has been told, also where its connection was closed after that."""
    messages: list[Any] = []
    with suppress(EOFError):
        while end.poll(0.5):
            messages.append(decode_to_worker(end.recv_bytes()))
    return messages


def shift_of(
    pool: Pool, out: Path, rows: int = 2, committed: Callable[[Sequence[ResultRow]], None] = lambda rows: None
) -> Supervisor:
    (out / "manifest").mkdir(parents=True, exist_ok=True)
    card, safety, folder = read_card(ModelSettings()), SafetySettings("none"), PinnedFolder.of(out)
    settings = WorkerSettings(card, COMPUTE, safety, OutputSettings(), folder, pa.schema([]))
    requests = [make_request(str(k)) for k in range(rows)]
    made = Supervisor(Task(iter(requests), rows, settings), pool, committed)
    for peer in pool.peers:
        made._add(peer)
    return made


def test_workers_on_other_kinds_of_devices_end_the_run(tmp_path: Path) -> None:
    pool = Pool(2)
    made = shift_of(pool, tmp_path)
    made._handle(pool.peers[1], DeviceReport(Device("cpu", "AMD EPYC")))
    assert isinstance(made._error, SettingsError)
    assert str(made._error) == "worker 1 computes on cpu and others on cuda: set --device"
    assert isinstance(heard(pool.ends[1])[-1], StopTask)


def test_another_card_of_the_same_kind_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(2)
    made = shift_of(pool, tmp_path)
    with caplog.at_level(logging.WARNING, "batch_infer"):
        made._handle(pool.peers[0], DeviceReport(Device("cuda", "NVIDIA H200", 1)))
        assert not caplog.records
        made._handle(pool.peers[1], DeviceReport(Device("cuda", "NVIDIA A10", 1)))
    assert made._error is None
    assert "worker 1 computes on NVIDIA A10 and others on NVIDIA H200" in caplog.text


def test_a_rank_with_another_model_does_not_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = shift_of(Pool(), tmp_path)._task.settings
    here, there = Pipe()
    monkeypatch.setattr(launched, "connect_to_rank_0", lambda *_: here)
    taken: list[WorkerSettings] = []
    monkeypatch.setattr(launched, "SupervisorConnection", lambda link, stop: None)
    monkeypatch.setattr(launched, "work", lambda parent, seat, own: taken.append(own(settings)))
    place = RankInfo(1, 2, 1, 2, "127.0.0.1")
    launched.join_launch(place, "auto", tmp_path, settings.card, lambda: False)
    assert taken[0].card == settings.card
    assert decode_from_worker(there.recv_bytes()) == Hello(1)
    changes: list[dict[str, Any]] = [{"fingerprint": "other"}, {"scheduler_fingerprint": "other"}]
    for change in changes:
        with pytest.raises(ModelError, match="rank 1: built-in demo model differs from what rank 0 has"):
            launched.join_launch(place, "auto", tmp_path, replace(settings.card, **change), lambda: False)


def test_a_row_that_workers_give_no_result_for_has_failed(tmp_path: Path) -> None:
    """It is handed out again, in the end alone, and no worker that is idle is waited for."""
    pool = Pool()
    done: list[ResultRow] = []
    made = shift_of(pool, tmp_path, rows=1, committed=done.extend)
    peer, end = pool.peers[0], pool.ends[0]
    made._handle(peer, ModelLoaded())
    for _ in range(MAX_DEATHS):
        made._handle(peer, WorkerIdle())
        made._hand_out_rows()
        assert not done
    chunks = [message for message in heard(end) if isinstance(message, RowChunk)]
    assert [[request.id for request in chunk.requests] for chunk in chunks] == [["0"]] * MAX_DEATHS
    made._handle(peer, WorkerIdle())
    assert [(row.id, row.status) for row in done] == [("0", "failed")]
    assert done[0].error == f"{MAX_DEATHS} workers gave no result for this row; worker 0 had no other row left"
    made._hand_out_rows()
    assert heard(end) == [NoMoreRows()]


def test_a_supervisor_that_was_suspended_does_not_hold_it_against_its_workers(tmp_path: Path, clock: Clock) -> None:
    pool = Pool()
    made = shift_of(pool, tmp_path)
    peer = pool.peers[0]
    made._handle(peer, ModelLoaded())
    turned = made._excuse_suspension(clock.now)
    clock.now = 4000.0
    assert peer.overdue_seconds(pool.timeouts) is not None
    assert made._excuse_suspension(turned) == 4000.0
    assert peer.overdue_seconds(pool.timeouts) is None


def test_a_worker_that_waits_while_tables_are_scanned_is_not_silent(tmp_path: Path, clock: Clock) -> None:
    pool = Pool()
    clock.now = 7200.0
    made = shift_of(pool, tmp_path)
    made._kill_silent_workers()
    assert made._workers == {0: pool.peers[0]}
    clock.now += 3601.0
    assert pool.peers[0].overdue_seconds(pool.timeouts) == 3601.0


@contextmanager
def silent_worker() -> Iterator[WorkerHandle]:
    connection, end = Pipe()
    with connection, end:
        yield WorkerHandle(0, connection)


def test_a_worker_that_finds_no_device_does_not_hang_the_run(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def wait_long() -> Iterator[Any]:
        clock.now += 100.0
        return iter(())

    monkeypatch.setattr(local, "POLL_SECONDS", 0.0)
    with silent_worker() as peer:
        monkeypatch.setattr(peer, "receive", wait_long)
        with pytest.raises(WorkersLost, match="found no device in 600 s"):
            local._wait_for_device(peer, 600.0)
    assert clock.now == 700.0


@pytest.mark.parametrize("compiling", [300.0, 3000.0])
def test_compilation_does_not_extend_patience(clock: Clock, compiling: float) -> None:
    """Neither that before the first sign, nor that of another size later."""
    timeouts = Timeouts(load=3600, start=3600, least=600, factor=10)
    with silent_worker() as peer:
        peer.is_loaded = True
        peer.mark_busy()
        for interval in (compiling, 1.0, 1.0, compiling / 6, 1.0):
            clock.now += interval
            assert peer.overdue_seconds(timeouts) is None
            peer.record_heartbeat()
        clock.now += 601.0
        assert peer.overdue_seconds(timeouts) == 601.0


def test_a_worker_that_is_to_stop_has_seconds(clock: Clock) -> None:
    """Whatever it does: load, compile, or wait. A slow step has twice its time."""
    timeouts = Timeouts(stop=4)
    with silent_worker() as peer:
        peer.is_idle = True
        clock.now = 4.5
        assert peer.overdue_seconds(timeouts) is None
        assert peer.overdue_seconds(timeouts, is_stopping=True) == 4.5
        peer.mark_busy()
        for _ in range(3):
            clock.now += 10.0
            peer.record_heartbeat()
        clock.now += 20.0
        assert peer.overdue_seconds(timeouts, is_stopping=True) is None
        clock.now += 0.5
        assert peer.overdue_seconds(timeouts, is_stopping=True) == 20.5


def test_rows_go_to_each_worker_as_soon_as_it_is_ready(tmp_path: Path) -> None:
    """The first does not take the share of the other, which loads its model."""
    pool = Pool(2)
    ready: list[str] = []
    made = shift_of(pool, tmp_path, rows=8)
    made._on_ready = lambda: ready.append("ready")
    made._starting = {0, 1}
    first, second = pool.peers
    made._handle(first, ModelLoaded())
    for message in (WorkerIdle(), RowRequest(), RowRequest()):
        made._handle(first, message)
        made._hand_out_rows()
    handed = heard(pool.ends[0])
    assert [type(message) for message in handed] == [StartTask, RowChunk, RowChunk, NoMoreRows]
    assert [request.id for message in handed[1:3] for request in message.requests] == ["0", "1", "2", "3"]
    made._handle(second, ModelLoaded())
    made._handle(second, WorkerIdle())
    made._hand_out_rows()
    assert [request.id for request in heard(pool.ends[1])[1].requests] == ["4"]
    assert ready == ["ready"]


def test_a_frozen_worker_does_not_hold_up_the_supervisor(tmp_path: Path) -> None:
    """It reads nothing, and has sent half a message."""
    pool = Pool(2)
    shift_of(pool, tmp_path)
    frozen, other = pool.peers
    os.write(pool.ends[0].fileno(), b"\0\0\1\0half")
    request = replace(make_request("0"), prompt="x" * 400_000)
    for _ in range(8):
        frozen.send(RowChunk((request,), False, b""))
    pool.ends[1].send_bytes(encode(Heartbeat()))
    assert eventually(lambda: list(other.receive()) == [Heartbeat()])
    assert list(frozen.receive()) == []
    frozen.kill()
    assert not any(thread.is_alive() for thread in frozen._threads)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("fate", ["closed", "silent"])
def test_a_worker_that_dies_while_it_stops_has_died(tmp_path: Path, clock: Clock, ours: bool, fate: str) -> None:
    """What it may have left in OUT is removed, unless its process may still be writing there."""
    pool = Pool()
    (end,) = pool.ends
    pool.peers[0].is_child = ours
    made = shift_of(pool, tmp_path)

    def stop() -> bool:
        if not pool.peers[0].is_loaded:
            return False
        if fate == "closed":
            end.close()
        clock.now += 1.0 * (fate == "silent")
        return True

    end.send_bytes(encode(ModelLoaded()))
    work = made.run(stop)
    assert (work.deaths, work.lost_remote_worker) == (1, not ours)


def test_carried_cells_arrive_as_they_were_sent() -> None:
    schema = pa.schema([("text", pa.string()), ("at", pa.timestamp("ns")), ("many", pa.list_(pa.int64()))])
    cells = {"text": "a", "at": 10**18 + 1, "many": [2**53 + 1]}
    chunk = Chunk(tuple(replace(make_request(str(k)), carried=cells) for k in range(2)), True)
    message = decode_to_worker(encode(RowChunk.from_chunk(chunk, schema)))
    assert isinstance(message, RowChunk)
    assert message.to_chunk() == chunk


def test_what_is_no_message_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    """A pickle is none."""
    connection, end = Pipe()
    with caplog.at_level(logging.WARNING, "batch_infer"), end:
        peer = WorkerHandle(1, connection)
        end.send({"a": "pickle"})
        assert peer.inbox_event.wait(60)
        with pytest.raises(EOFError):
            list(peer.receive())
    assert "worker 1 sent an invalid message" in caplog.text


def test_a_worker_whose_every_step_is_slow_is_not_taken_for_a_hung_one(clock: Clock) -> None:
    """A batch of a slow pipeline takes longer than `least`: the first one says so."""
    timeouts = Timeouts(load=3600, start=3600, least=600, factor=10)
    with silent_worker() as peer:
        peer.is_loaded = True
        peer.mark_busy()
        for _ in range(3):
            clock.now += 900.0
            assert peer.overdue_seconds(timeouts) is None
            peer.record_heartbeat()
        clock.now += 9001.0
        assert peer.overdue_seconds(timeouts) == 9001.0
