"""Test the supervision of workers: GPU selection, timeouts of silent workers, and workers on different devices."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
from batch_infer.engines import Task, TaskReport, handle, launched, local
from batch_infer.engines import supervisor as supervisor_module
from batch_infer.engines.handle import Timeouts, WorkerHandle
from batch_infer.engines.launched import RankInfo
from batch_infer.engines.ledger import MAX_DEATHS, Chunk
from batch_infer.engines.messages import (
    CommitReport,
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
from batch_infer.engines.protocol import WorkersLostError
from batch_infer.engines.supervisor import Supervisor
from batch_infer.engines.worker_process import LAUNCHER_NAMES, WorkerSpec, select_gpu
from batch_infer.errors import ModelError, SettingsError
from batch_infer.models import read_card
from batch_infer.records import ResultRow
from batch_infer.settings import Compute, Device, ModelSettings, OutputSettings, SafetySettings
from batch_infer.store import LocalStore
from batch_infer.worker import WorkerReport, WorkerSettings
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
    """If a launcher shows the process only one GPU or none, nothing changes."""
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setattr("batch_infer.engines.worker_process.os.environ", environment)
    environment |= dict.fromkeys(LAUNCHER_NAMES, "1")
    select_gpu(WorkerSpec(gpu, gpu, device))
    assert environment == ({} if seen is None else {"CUDA_VISIBLE_DEVICES": seen})


@pytest.mark.parametrize(
    ("visible", "cuda_count", "count"), [(None, 2, 2), ("0,1", 2, 2), (MIG, 1, 3), (MIG, 0, 0), ("MIG-1,0", 1, 1)]
)
def test_each_mig_slice_in_the_list_counts_as_a_device(
    visible: str | None, cuda_count: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices._count_cuda_devices() == count


class Clock:
    """A clock that only the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (handle, supervisor_module, local):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class FakeSource:
    """A source of workers without processes. The test sends and receives their messages through `ends`."""

    timeouts = Timeouts(load=3600, start=3600, least=600, factor=10)

    def __init__(self, workers: int = 1) -> None:
        self.worker_count = workers
        self.handles, self.ends = [], []
        for rank in range(workers):
            connection, end = Pipe()
            self.handles.append(WorkerHandle(rank, connection))
            self.ends.append(end)

    def start(self, expected_count: int) -> Iterable[WorkerHandle]:
        return self.handles

    def arrivals(self) -> Iterable[WorkerHandle]:
        return ()

    def pending(self) -> Collection[int]:
        return ()

    def failed_starts(self) -> Iterable[tuple[int, str]]:
        return ()

    def restart(self, rank: int) -> WorkerHandle | None:
        return None


def messages_to(end: Connection) -> list[Any]:
    """Return all messages to a worker, even if its connection was closed afterwards."""
    messages: list[Any] = []
    with suppress(EOFError):
        while end.poll(0.5):
            messages.append(decode_to_worker(end.recv_bytes()))
    return messages


def make_supervisor(
    source: FakeSource,
    out: Path,
    rows: int = 2,
    on_commit: Callable[[Sequence[ResultRow]], None] = lambda rows: None,
    on_report: Callable[[TaskReport], None] = lambda report: None,
) -> Supervisor:
    (out / "manifest").mkdir(parents=True, exist_ok=True)
    card, safety, folder = read_card(ModelSettings()), SafetySettings("none"), LocalStore(out).address
    settings = WorkerSettings(card, COMPUTE, safety, OutputSettings(), folder, pa.schema([]))
    requests = [make_request(str(k)) for k in range(rows)]
    supervisor = Supervisor(Task(iter(requests), rows, settings, on_report), source, on_commit)
    for worker in source.handles:
        supervisor._add(worker)
    return supervisor


def test_workers_on_different_kinds_of_devices_end_the_run(tmp_path: Path) -> None:
    source = FakeSource(2)
    supervisor = make_supervisor(source, tmp_path)
    supervisor._handle(source.handles[1], DeviceReport(Device("cpu", "AMD EPYC")))
    assert isinstance(supervisor._error, SettingsError)
    assert str(supervisor._error) == "worker 1 computes on cpu and others on cuda: set --device"
    assert isinstance(messages_to(source.ends[1])[-1], StopTask)


def test_workers_on_different_gpus_cause_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = FakeSource(2)
    supervisor = make_supervisor(source, tmp_path)
    with caplog.at_level(logging.WARNING, "batch_infer"):
        supervisor._handle(source.handles[0], DeviceReport(Device("cuda", "NVIDIA H200", 1)))
        assert not caplog.records
        supervisor._handle(source.handles[1], DeviceReport(Device("cuda", "NVIDIA A10", 1)))
    assert supervisor._error is None
    assert "worker 1 computes on NVIDIA A10 and others on NVIDIA H200" in caplog.text


def test_a_rank_with_another_model_raises_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_supervisor(FakeSource(), tmp_path)._task.settings
    connection, end = Pipe()
    monkeypatch.setattr(launched, "connect_to_rank_0", lambda *_: connection)
    localized: list[WorkerSettings] = []
    monkeypatch.setattr(launched, "SupervisorConnection", lambda connection, stop: None)
    monkeypatch.setattr(launched, "work", lambda supervisor, spec, localize: localized.append(localize(settings)))
    rank_info = RankInfo(1, 2, 1, 2, "127.0.0.1")
    launched.join_launch(rank_info, "auto", LocalStore(tmp_path), settings.card, lambda: False)
    assert localized[0].card == settings.card
    assert decode_from_worker(end.recv_bytes()) == Hello(1)
    changes: list[dict[str, Any]] = [{"fingerprint": "other"}, {"scheduler_fingerprint": "other"}]
    for change in changes:
        with pytest.raises(ModelError, match="rank 1: built-in demo model differs from rank 0's model"):
            launched.join_launch(
                rank_info, "auto", LocalStore(tmp_path), replace(settings.card, **change), lambda: False
            )


def test_a_row_without_a_result_fails_after_three_attempts(tmp_path: Path) -> None:
    """The row is retried, the last time alone, and the supervisor does not wait for the idle worker."""
    source = FakeSource()
    committed: list[ResultRow] = []
    supervisor = make_supervisor(source, tmp_path, rows=1, on_commit=committed.extend)
    worker, end = source.handles[0], source.ends[0]
    supervisor._handle(worker, ModelLoaded())
    for _ in range(MAX_DEATHS):
        supervisor._handle(worker, WorkerIdle())
        supervisor._hand_out_rows()
        assert not committed
    chunks = [message for message in messages_to(end) if isinstance(message, RowChunk)]
    assert [[request.id for request in chunk.requests] for chunk in chunks] == [["0"]] * MAX_DEATHS
    supervisor._handle(worker, WorkerIdle())
    assert [(row.id, row.status) for row in committed] == [("0", "failed")]
    assert committed[0].error == f"{MAX_DEATHS} workers gave no result for this row, the last with no other row"
    supervisor._hand_out_rows()
    assert messages_to(end) == [NoMoreRows()]


def test_a_death_is_reported_at_once(tmp_path: Path) -> None:
    """`status` shows it while the other workers render."""
    source, reports = FakeSource(2), list[TaskReport]()
    supervisor = make_supervisor(source, tmp_path, on_report=reports.append)
    report = WorkerReport({}, COMPUTE, None, {"host_bytes": 7})
    supervisor._handle(source.handles[0], CommitReport([], report))
    supervisor._remove(source.handles[1], has_died=True)
    assert [(state.deaths, state.worker_reports) for state in reports] == [(0, [report]), (1, [report])]


def test_workers_are_not_killed_after_the_supervisor_was_suspended(tmp_path: Path, clock: Clock) -> None:
    source = FakeSource()
    supervisor = make_supervisor(source, tmp_path)
    worker = source.handles[0]
    supervisor._handle(worker, ModelLoaded())
    last_turn = supervisor._reset_after_suspension(clock.now)
    clock.now = 4000.0
    assert worker.overdue_seconds(source.timeouts) is not None
    assert supervisor._reset_after_suspension(last_turn) == 4000.0
    assert worker.overdue_seconds(source.timeouts) is None


def test_a_worker_that_waits_for_a_table_scan_is_not_killed(tmp_path: Path, clock: Clock) -> None:
    source = FakeSource()
    clock.now = 7200.0
    supervisor = make_supervisor(source, tmp_path)
    supervisor._kill_silent_workers()
    assert supervisor._workers == {0: source.handles[0]}
    clock.now += 3601.0
    assert source.handles[0].overdue_seconds(source.timeouts) == 3601.0


@contextmanager
def silent_worker() -> Iterator[WorkerHandle]:
    connection, end = Pipe()
    with connection, end:
        yield WorkerHandle(0, connection)


def test_waiting_for_a_device_times_out(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def wait_long() -> Iterator[Any]:
        clock.now += 100.0
        return iter(())

    monkeypatch.setattr(local, "POLL_SECONDS", 0.0)
    with silent_worker() as worker:
        monkeypatch.setattr(worker, "receive", wait_long)
        with pytest.raises(WorkersLostError, match="found no device in 600 s"):
            local.wait_for_device(worker, 600.0)
    assert clock.now == 700.0


@pytest.mark.parametrize("compiling", [300.0, 3000.0])
def test_compilation_does_not_extend_the_timeout(clock: Clock, compiling: float) -> None:
    """Neither compilation before the first heartbeat nor later compilation for another size extends the timeout."""
    timeouts = Timeouts(load=3600, start=3600, least=600, factor=10)
    with silent_worker() as worker:
        worker.is_loaded = True
        worker.mark_busy()
        for interval in (compiling, 1.0, 1.0, compiling / 6, 1.0):
            clock.now += interval
            assert worker.overdue_seconds(timeouts) is None
            worker.record_heartbeat()
        clock.now += 601.0
        assert worker.overdue_seconds(timeouts) == 601.0


def test_a_worker_that_does_not_stop_is_killed_within_seconds(clock: Clock) -> None:
    """A worker with slow steps gets twice its usual interval."""
    timeouts = Timeouts(stop=4)
    with silent_worker() as worker:
        worker.is_idle = True
        clock.now = 4.5
        assert worker.overdue_seconds(timeouts) is None
        assert worker.overdue_seconds(timeouts, is_stopping=True) == 4.5
        worker.mark_busy()
        for _ in range(3):
            clock.now += 10.0
            worker.record_heartbeat()
        clock.now += 20.0
        assert worker.overdue_seconds(timeouts, is_stopping=True) is None
        clock.now += 0.5
        assert worker.overdue_seconds(timeouts, is_stopping=True) == 20.5


def test_each_worker_gets_rows_as_soon_as_it_has_loaded_the_model(tmp_path: Path) -> None:
    """The first worker leaves half of the rows to the other, which is still loading."""
    source = FakeSource(2)
    ready: list[str] = []
    supervisor = make_supervisor(source, tmp_path, rows=8)
    supervisor._on_ready = lambda: ready.append("ready")
    first, second = source.handles
    supervisor._handle(first, ModelLoaded())
    for message in (WorkerIdle(), RowRequest(), RowRequest()):
        supervisor._handle(first, message)
        supervisor._hand_out_rows()
    received = messages_to(source.ends[0])
    assert [type(message) for message in received] == [StartTask, RowChunk, RowChunk, NoMoreRows]
    assert [request.id for message in received[1:3] for request in message.requests] == ["0", "1", "2", "3"]
    supervisor._handle(second, ModelLoaded())
    supervisor._handle(second, WorkerIdle())
    supervisor._hand_out_rows()
    assert [request.id for request in messages_to(source.ends[1])[1].requests] == ["4"]
    assert ready == ["ready"]


def test_a_frozen_worker_does_not_block_the_supervisor(tmp_path: Path) -> None:
    """The worker receives nothing, and has sent half of a message."""
    source = FakeSource(2)
    make_supervisor(source, tmp_path)
    frozen, other = source.handles
    os.write(source.ends[0].fileno(), b"\0\0\1\0half")
    request = replace(make_request("0"), prompt="x" * 400_000)
    for _ in range(8):
        frozen.send(RowChunk((request,), False, b""))
    source.ends[1].send_bytes(encode(Heartbeat()))
    assert eventually(lambda: list(other.receive()) == [Heartbeat()])
    assert list(frozen.receive()) == []
    frozen.kill()
    assert not any(thread.is_alive() for thread in frozen._threads)


@pytest.mark.parametrize("is_child", [True, False])
@pytest.mark.parametrize("connection", ["closed", "silent"])
def test_a_death_while_stopping_is_counted(tmp_path: Path, clock: Clock, is_child: bool, connection: str) -> None:
    """The run then removes temporary files from OUT, unless the worker's process may still write there."""
    source = FakeSource()
    (end,) = source.ends
    source.handles[0].is_child = is_child
    supervisor = make_supervisor(source, tmp_path)

    def stop() -> bool:
        if not source.handles[0].is_loaded:
            return False
        if connection == "closed":
            end.close()
        clock.now += 1.0 * (connection == "silent")
        return True

    end.send_bytes(encode(ModelLoaded()))
    report = supervisor.run(stop)
    assert (report.deaths, report.lost_remote_worker) == (1, not is_child)


def test_carried_cells_arrive_as_they_were_sent() -> None:
    schema = pa.schema([("text", pa.string()), ("at", pa.timestamp("ns")), ("many", pa.list_(pa.int64()))])
    cells = {"text": "a", "at": 10**18 + 1, "many": [2**53 + 1]}
    chunk = Chunk(tuple(replace(make_request(str(k)), carried=cells) for k in range(2)), True)
    message = decode_to_worker(encode(RowChunk.from_chunk(chunk, schema)))
    assert isinstance(message, RowChunk)
    assert message.to_chunk() == chunk


def test_an_invalid_message_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    connection, end = Pipe()
    with caplog.at_level(logging.WARNING, "batch_infer"), end:
        worker = WorkerHandle(1, connection)
        end.send({"a": "pickled"})  # messages are MessagePack
        assert worker.inbox_event.wait(60)
        with pytest.raises(EOFError):
            list(worker.receive())
    assert "worker 1 sent an invalid message" in caplog.text


def test_a_worker_with_slow_steps_is_not_killed(clock: Clock) -> None:
    """A batch of a slow pipeline may take longer than `least`."""
    timeouts = Timeouts(load=3600, start=3600, least=600, factor=10)
    with silent_worker() as worker:
        worker.is_loaded = True
        worker.mark_busy()
        for _ in range(3):
            clock.now += 900.0
            assert worker.overdue_seconds(timeouts) is None
            worker.record_heartbeat()
        clock.now += 9001.0
        assert worker.overdue_seconds(timeouts) == 9001.0


class PendingSource(FakeSource):
    """A source whose only worker is pending, and ends before it connects, time after time, if there is a cause."""

    def __init__(self, cause: str | None) -> None:
        super().__init__(0)
        self._cause, self.requests = cause, 1

    def pending(self) -> Collection[int]:
        return (0,) if self._cause is None or self.requests else ()

    def failed_starts(self) -> Iterable[tuple[int, str]]:
        if self._cause is not None and self.requests:
            self.requests -= 1
            yield 0, self._cause

    def restart(self, rank: int) -> WorkerHandle | None:
        self.requests += 1
        return None


def test_a_run_waits_for_pending_workers_until_it_is_stopped(tmp_path: Path) -> None:
    calls = iter([False] * 3)
    report = make_supervisor(PendingSource(None), tmp_path).run(lambda: next(calls, True))
    assert next(calls, None) is None
    assert (report.worker_reports, report.deaths) == ([], 0)


def test_workers_that_end_before_they_connect_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor_module, "POLL_SECONDS", 0.001)
    supervisor = make_supervisor(PendingSource("no memory"), tmp_path)
    with (
        caplog.at_level(logging.INFO, "batch_infer"),
        pytest.raises(WorkersLostError, match="no worker is left: the last one died .no memory"),
    ):
        supervisor.run(lambda: False)
    assert caplog.text.count("worker 0 ended before it connected (no memory)") == supervisor_module.MAX_FAILURES
    assert caplog.text.count("worker 0 is requested again") == supervisor_module.MAX_FAILURES - 1
