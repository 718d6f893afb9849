"""Worker processes as their parent sees them: started, replaced and killed, each with a folder, a log and a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import batch_infer
from batch_infer.simulation.mini_batches import MiniBatch
from batch_infer.simulation.settings import SimulationSettings
from batch_infer.simulation.worker import MessageFromWorker, MessageToWorker, ScriptTask
from batch_infer.store import temporary_file_errors, write_errors

EXIT_SECONDS = 10.0
"""How long to wait for the end of a process that was killed."""
NVIDIA_SMI_SECONDS = 20.0
KILLED, TIMED_OUT = "killed by --kill", "killed: the mini-batch took longer than --timeout"
PROGRAM = (
    "import sys; sys.path.append({root!r}); from batch_infer.simulation.worker import run_worker; run_worker({number})"
)


@dataclass(slots=True)
class Assignment:
    """A mini-batch that a worker has, the time when its run() was called, and the seconds to a simulated kill."""

    mini_batch: MiniBatch
    kill_after: float | None = None
    start: float | None = None

    def deadline(self, timeout: float) -> tuple[float, str] | None:
        """Return when to kill the worker if it is not done before, and why."""
        if self.start is None:
            return None
        if self.kill_after is not None and self.kill_after < timeout:
            return self.start + self.kill_after, KILLED
        return self.start + timeout, TIMED_OUT


class WorkerProcess:
    """One worker process, from its start to its end."""

    def __init__(self, index: int, folder: Path, log: Path, environment: Mapping[str, str], task: ScriptTask) -> None:
        """Start it in a working folder that does not exist yet."""
        self.index, self.log = index, log
        self.is_ready = False
        self.assignment: Assignment | None = None
        self.kill_reason = ""
        self.connection, worker_connection = Pipe()
        with temporary_file_errors():
            folder.mkdir()
        try:
            self._process = _start_process(folder, log, environment, worker_connection)
        finally:
            worker_connection.close()  # otherwise the connection would stay open when the process has ended
        self.send(task)

    def send(self, message: MessageToWorker) -> None:
        """Send a message. One to a worker that has died is dropped; `receive` reports the death."""
        with suppress(OSError):
            self.connection.send(message)

    def receive(self) -> Iterator[MessageFromWorker]:
        """Yield the messages that have arrived. Raises EOFError if the process has ended and all were received."""
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except OSError as error:  # the connection was reset
            raise EOFError from error
        # Processes that the script has started may hold the connection open.
        if self._process.poll() is not None and not self.connection.poll():
            raise EOFError

    def kill(self, reason: str = "killed") -> None:
        """Kill it with all processes that it has started. Messages that it has sent can still be received."""
        self.kill_reason = self.kill_reason or reason
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait(EXIT_SECONDS)

    def wait(self, seconds: float) -> int | None:
        """Wait for its end, and return the exit code, None where it still runs."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode

    def close(self) -> None:
        """Kill it and close the connection."""
        self.kill()
        self.connection.close()

    def describe_exit(self) -> str:
        code = self.wait(EXIT_SECONDS)
        if self.kill_reason or code is None:
            return self.kill_reason or "it closed its connection"
        if code >= 0:
            return f"its process ended with exit code {code}"
        return f"its process was killed by {signal.Signals(-code).name}"


def _start_process(
    folder: Path, log: Path, environment: Mapping[str, str], connection: Connection
) -> subprocess.Popen[bytes]:
    """Start a process in its own session, so that Ctrl-C reaches only the parent, which then ends it."""
    root, number = str(Path(batch_infer.__file__).parent.parent), connection.fileno()
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-u", "-c", PROGRAM.format(root=root, number=number)],
            cwd=folder,
            env=dict(environment),
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


class WorkerGroup:
    """The running workers of a job by index. A replacement has the index and the GPU of the worker that has died."""

    def __init__(self, settings: SimulationSettings, folder: Path) -> None:
        """Remove the logs of an earlier job. `folder`: for working folders. Raises SettingsError, StorageError."""
        self._settings, self._folder = settings, folder
        to_csv = settings.to_csv() if settings.append_rows else None
        self._task = ScriptTask(os.path.abspath(settings.script), to_csv)  # noqa: PTH100
        self._gpus = find_gpus(settings.gpus)
        self._size = settings.workers or max(1, len(self._gpus))
        self._folder_numbers = count()
        self.workers: dict[int, WorkerProcess] = {}
        self.logs = settings.out / "logs" / "azureml"
        with write_errors(self.logs):
            self.logs.mkdir(parents=True, exist_ok=True)
            for log in list(self.logs.glob("worker-*.log")):
                log.unlink()

    def start_missing(self) -> None:
        for index in range(self._size):
            if index not in self.workers:
                folder = self._folder / f"{next(self._folder_numbers)}"
                environment = make_environment(self._settings, self._gpus, index)
                log = self.logs / f"worker-{index}.log"
                with write_errors(folder):
                    self.workers[index] = WorkerProcess(index, folder, log, environment, self._task)

    def remove(self, worker: WorkerProcess) -> None:
        """Kill a worker, if it still runs, and remove it."""
        del self.workers[worker.index]
        worker.close()

    def close(self) -> None:
        for worker in list(self.workers.values()):
            self.remove(worker)

    def shut_down(self, seconds: float) -> list[WorkerProcess]:
        """Let idle workers call shutdown(), and return those that did not end in time or ended with an error.

        Workers whose init() has not returned are not waited for.
        """
        ready = [worker for worker in self.workers.values() if worker.is_ready]
        for worker in ready:
            worker.send(None)
        deadline = time.monotonic() + seconds
        return [worker for worker in ready if worker.wait(max(0.0, deadline - time.monotonic())) != 0]


def make_environment(settings: SimulationSettings, gpus: Sequence[str], index: int) -> dict[str, str]:
    """Return a worker's environment. As in Azure, workers beyond the GPUs have no CUDA_VISIBLE_DEVICES."""
    environment = {**os.environ, **settings.environment}
    environment["AZUREML_BI_OUTPUT_PATH"] = os.path.abspath(settings.out)  # noqa: PTH100
    environment["AZ_BATCHAI_GPU_COUNT_FOUND"] = str(len(gpus))
    if settings.model_dir is not None:
        environment["AZUREML_MODEL_DIR"] = os.path.abspath(settings.model_dir)  # noqa: PTH100
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if index < len(gpus):
        environment["CUDA_VISIBLE_DEVICES"] = gpus[index]
    return environment


def find_gpus(limit: int | None) -> Sequence[str]:
    """Return the CUDA_VISIBLE_DEVICES entry of `limit` GPUs, or of all that this process sees, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(_count_gpus() if limit is None else limit)]
    names = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if limit is None:
        return names
    return [names[index] if index < len(names) else str(index) for index in range(limit)]


def _count_gpus() -> int:
    command = ["nvidia-smi", "-L"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):  # not installed, or the driver does not answer
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
