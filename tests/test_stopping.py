"""Test that SIGTERM, SIGINT, SIGHUP and --time-limit end every phase of a command within seconds, with exit code 75."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest

from batch_infer.manifest import to_table
from batch_infer.manifest.parts import write_part
from batch_infer.records import ResultRow, utc_now
from tests.deaths import eventually, is_alive, workers_of
from tests.hub import hub

pytestmark = [pytest.mark.promises, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]

SECONDS = 5.0
"""Seconds within which a command must end."""


@contextmanager
def started(
    *arguments: str | Path,
    program: tuple[str, ...] = ("-m", "batch_infer"),
    stdin: int = subprocess.DEVNULL,
    **environment: str,
) -> Iterator[Command]:
    """Run a command line in its own process."""
    line = [sys.executable, *program, *map(str, arguments)]
    process = subprocess.Popen(line, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, **environment})  # fmt: skip
    try:
        yield Command(process)
    finally:
        process.kill()
        process.communicate()


class Command:
    """A command that is running and can be stopped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def wait_until(self, condition: Callable[[], bool]) -> None:
        assert eventually(lambda: condition() or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()

    def assert_stops(self, number: signal.Signals = signal.SIGTERM) -> str:
        """Stop the command with a signal once it handles that, and return its stderr."""
        self.wait_until(lambda: handles(self.process.pid, number))
        workers = workers_of(self.process.pid)
        began = time.monotonic()
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=60)
        took = time.monotonic() - began
        assert self.process.returncode == 75, stderr
        assert took < SECONDS, stderr
        assert "Traceback" not in stderr
        assert number.name in stderr
        assert not any(map(is_alive, workers))
        return stderr


def handles(process: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


@contextmanager
def slow_server() -> Iterator[tuple[str, threading.Event]]:
    """Run an HTTP server that announces a gigabyte and sends one byte per second. A request sets the event."""
    is_requested, is_over = threading.Event(), threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.recv(4096)
            is_requested.set()
            commit = "0123456789abcdef0123456789abcdef01234567"
            head = f'HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\nX-Repo-Commit: {commit}\r\nETag: "0"\r\n\r\n'
            try:
                connection.sendall(head.encode())
                while not is_over.wait(1):
                    connection.sendall(b"p")
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", is_requested
        is_over.set()
        server.shutdown(socket.SHUT_RDWR)


def large_table(path: Path, rows: int) -> Path:
    prompts = pa.array(["a red circle"]).take(pa.array([0] * rows))
    pa.csv.write_csv(pa.table({"prompt": prompts}), path)
    return path


def table_of(folder: Path, rows: int = 1) -> Path:
    return large_table(folder / "t.csv", rows)


OPTIONS = ("--device", "cpu", "--threads", "1", "--steps", "2", "--slots", "8")


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_download_of_a_model(tmp_path: Path, number: signal.Signals) -> None:
    with slow_server() as (address, is_requested), started(
        "run", table_of(tmp_path), "-o", tmp_path / "out", "--model", "owner/model", *OPTIONS,
        HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hub"),
    ) as command:  # fmt: skip
        command.wait_until(is_requested.is_set)
        command.assert_stops(number)


def test_a_signal_stops_the_download_of_a_file(tmp_path: Path, sd1_folder: Path) -> None:
    with hub(model=sd1_folder) as served:
        served.slow = slow = "unet/diffusion_pytorch_model.safetensors"
        with started(
            "run", table_of(tmp_path), "-o", tmp_path / "out", "--model", "owner/model", *OPTIONS,
            HF_ENDPOINT=served.address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hub"),
        ) as command:  # fmt: skip
            command.wait_until(lambda: any(slow in file for file in served.fetched))
            command.assert_stops()


def test_a_signal_stops_fetching_a_table(tmp_path: Path) -> None:
    with slow_server() as (address, is_requested), started(
        "run", f"{address}/t.csv", "-o", tmp_path / "out", *OPTIONS
    ) as command:  # fmt: skip
        command.wait_until(is_requested.is_set)
        command.assert_stops()


@pytest.mark.parametrize("processes", ["0", "1"])
def test_a_signal_stops_a_scan(tmp_path: Path, processes: str) -> None:
    table, out = large_table(tmp_path / "t.csv", 1_000_000), tmp_path / "out"
    with started("run", table, "-o", out, *OPTIONS, "--num-processes", processes) as command:
        command.wait_until((out / "run.json").exists)
        command.assert_stops()
    assert not list(out.rglob(".tmp-*"))


def test_a_signal_stops_a_plan(tmp_path: Path) -> None:
    table = large_table(tmp_path / "t.csv", 1_000_000)
    with started("plan", table, *OPTIONS) as command:
        command.wait_until(lambda: str(table) in open_files(command.process.pid))
        assert "nothing is kept" in command.assert_stops()


@pytest.fixture(scope="module")
def large_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an OUT whose manifest has 300,000 rows."""
    out = tmp_path_factory.mktemp("large_out") / "out"
    (out / "manifest").mkdir(parents=True)
    row = ResultRow(
        id="", image_index=0, prompt="a red circle", status="ok", finished_at=utc_now(),
        source_file="t.csv", source_row=0, fingerprint="f",
    )  # fmt: skip
    part = to_table([row] * 10_000, pa.schema([]))
    for first in range(0, 300_000, len(part)):
        numbers = range(first, first + len(part))
        ids = pa.array([f"t-{number}" for number in numbers])
        part = part.set_column(0, part.schema.field("id"), ids)
        part = part.set_column(part.column_names.index("source_row"), part.schema.field("source_row"), [numbers])
        write_part(out / "manifest" / f"part-{first}.parquet", part, "here", 0.0)
    return out


@pytest.mark.parametrize("results", ["parquet", "jsonl"])
def test_a_signal_stops_a_merge(large_out: Path, results: str) -> None:
    (large_out / "results.parquet").write_text("as it was")
    with started("merge", large_out, "--results", results) as command:
        command.wait_until(lambda: bool(list(large_out.glob(".tmp-*results.*"))))
        assert "results.* are unchanged" in command.assert_stops()
    assert (large_out / "results.parquet").read_text() == "as it was"
    assert not list(large_out.glob(".tmp-*"))


def make_hanging_torch(folder: Path) -> str:
    """Return a PYTHONPATH whose torch hangs on import, as a broken driver would make it."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("import time\ntime.sleep(3600)\n")
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_a_signal_stops_the_start_of_a_worker(tmp_path: Path) -> None:
    with started(
        "run", table_of(tmp_path), "-o", tmp_path / "out", *OPTIONS, PYTHONPATH=make_hanging_torch(tmp_path / "hanging")
    ) as command:
        command.wait_until(lambda: bool(workers_of(command.process.pid)))
        command.assert_stops()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_reading_idle_standard_input(tmp_path: Path, number: signal.Signals) -> None:
    with started("run", "-", "-o", tmp_path / "out", *OPTIONS, stdin=subprocess.PIPE) as command:
        command.wait_until(lambda: "batch-infer-" in open_files(command.process.pid))
        command.assert_stops(number)


def test_the_time_limit_stops_reading_idle_standard_input(tmp_path: Path) -> None:
    with started("run", "-", "-o", tmp_path / "out", *OPTIONS, "--time-limit", "3s", stdin=subprocess.PIPE) as command:
        assert command.process.wait(3 + 2 * SECONDS) == 75
        assert command.process.stderr is not None
        assert "the time limit was reached" in command.process.stderr.read()


def test_a_signal_stops_waiting_for_the_writer_of_a_fifo(tmp_path: Path) -> None:
    fifo = tmp_path / "t.csv"
    os.mkfifo(fifo)
    with started("run", fifo, "-o", tmp_path / "out", *OPTIONS) as command:
        command.assert_stops()


def test_a_signal_stops_reading_an_idle_fifo(tmp_path: Path) -> None:
    fifo, writers = tmp_path / "t.csv", list[int]()
    os.mkfifo(fifo)

    def has_reader() -> bool:
        with suppress(OSError):  # as long as nothing reads
            writers.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    with started("run", fifo, "-o", tmp_path / "out", *OPTIONS) as command:
        command.wait_until(has_reader)
        command.assert_stops()
    os.close(*writers)


def open_files(process: int) -> str:
    folder = Path(f"/proc/{process}/fd")
    try:
        return " ".join(os.readlink(link) for link in folder.iterdir())  # noqa: PTH115
    except OSError:
        return ""


STUCK = """
import ctypes
import batch_infer.jobs.run as jobs
from batch_infer.__main__ import main

def wait(*_):  # a library that never returns to Python, whatever the signal
    mutex = ctypes.create_string_buffer(64)
    print("stuck", flush=True)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

jobs.open_tables = wait
main()
"""


def test_a_signal_ends_a_process_stuck_in_a_library(tmp_path: Path) -> None:
    with started("run", table_of(tmp_path), "-o", tmp_path / "out", *OPTIONS, program=("-c", STUCK)) as command:
        assert command.process.stdout is not None
        assert command.process.stdout.readline() == "stuck\n"
        assert "stopped by SIGTERM" in command.assert_stops()
