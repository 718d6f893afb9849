"""Start, replace and kill worker processes. Each has a working folder and a log, and a GPU if there are enough."""

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
from pathlib import Path

import batch_infer
from batch_infer.simulation.schedule import MiniBatch, MiniBatchState
from batch_infer.simulation.settings import SimulationSettings
from batch_infer.simulation.worker import MessageFromWorker
from batch_infer.store import temporary_file_errors, write_errors

EXIT_SECONDS = 10.0
"""Maximum number of seconds to wait for a process to end after it was killed or closed its connection."""
SHUTDOWN_SECONDS = 30.0
"""Maximum number of seconds to wait for workers to shut down at the end of the job."""
NVIDIA_SMI_SECONDS = 20.0
KILLED, TIMED_OUT = "killed by --kill", "killed: the mini-batch took longer than --timeout"
PROGRAM = (
    "import sys; sys.path.append({root!r}); from batch_infer.simulation.worker import run_worker; run_worker{arguments}"
)


@dataclass(slots=True)
class Assignment:
    """A worker's mini-batch. run() was called at `start`, and `kill_after` is the seconds from then to a kill."""

    state: MiniBatchState
    kill_after: float | None = None
    start: float | None = None

    def deadline(self, timeout: float) -> tuple[float, str] | None:
        """Return the time at which to kill the worker, and the reason, or None if run() has not been called yet."""
        if self.start is None:
            return None
        if self.kill_after is not None and self.kill_after < timeout:
            return self.start + self.kill_after, KILLED
        return self.start + timeout, TIMED_OUT


class WorkerProcess:
    """A worker process, which is running or has ended."""

    def __init__(
        self, index: int, folder: Path, log: Path, environment: Mapping[str, str], task: tuple[object, ...]
    ) -> None:
        """Start the process in a new working folder. `task` contains the arguments of `run_worker` after the first.

        The process has its own session, so that Ctrl-C reaches only the parent, which then ends the process.
        """
        self.index, self.log = index, log
        self.is_ready = False
        self.assignment: Assignment | None = None
        self.kill_reason = ""
        self.connection, worker_connection = Pipe()
        number = worker_connection.fileno()
        program = PROGRAM.format(root=str(Path(batch_infer.__file__).parent.parent), arguments=(number, *task))
        with worker_connection:  # close it in this process, so that the connection closes when the worker ends
            with temporary_file_errors():
                folder.mkdir()
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-u", "-c", program],
                    cwd=folder,
                    env=environment,
                    pass_fds=[number],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )

    def send(self, mini_batch: MiniBatch | None) -> None:
        """Send a mini-batch, or None to request shutdown. If the worker has died, `receive` reports it."""
        with suppress(OSError):
            self.connection.send(mini_batch)

    def receive(self) -> Iterator[MessageFromWorker]:
        """Yield the messages that have arrived. Raises EOFError after the last one if no more can arrive."""
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except OSError as error:  # the connection was reset
            raise EOFError from error
        # Processes that the script started may keep the connection open after the worker has ended.
        if self._process.poll() is not None and not self.connection.poll():
            raise EOFError

    def kill(self, reason: str = "killed") -> None:
        """Kill the process and its process group. Messages that it sent can still be received."""
        self.kill_reason = self.kill_reason or reason
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait(EXIT_SECONDS)

    def wait(self, seconds: float) -> int | None:
        """Wait at most `seconds` for the process to end. Return its exit code, or None if it is still running."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode

    def describe_exit(self) -> str:
        code = self.wait(EXIT_SECONDS)
        if self.kill_reason or code is None:
            return self.kill_reason or "it closed its connection"
        if code >= 0:
            return f"its process ended with exit code {code}"
        return f"its process was killed by {signal.Signals(-code).name}"


class WorkerGroup:
    """Holds the workers of a job by index. A replacement has the index and the GPU, if any, of the worker that died."""

    def __init__(self, settings: SimulationSettings, folder: Path) -> None:
        """Remove the logs of an earlier job. Working folders go into `folder`. Raises SettingsError, StorageError."""
        self._settings, self._folder = settings, folder
        to_csv = settings.to_csv() if settings.append_rows else None
        self._task = (os.path.abspath(settings.script), to_csv)  # noqa: PTH100
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
                log = self.logs / f"worker-{index}.log"
                with write_errors(folder):
                    self.workers[index] = WorkerProcess(index, folder, log, self._make_environment(index), self._task)

    def _make_environment(self, index: int) -> dict[str, str]:
        """Return a worker's environment. As in Azure, workers in excess of the GPUs have no CUDA_VISIBLE_DEVICES."""
        environment = {**os.environ, **self._settings.environment}
        environment["AZUREML_BI_OUTPUT_PATH"] = os.path.abspath(self._settings.out)  # noqa: PTH100
        environment["AZ_BATCHAI_GPU_COUNT_FOUND"] = str(len(self._gpus))
        if self._settings.model_dir is not None:
            environment["AZUREML_MODEL_DIR"] = os.path.abspath(self._settings.model_dir)  # noqa: PTH100
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if index < len(self._gpus):
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[index]
        return environment

    def remove(self, worker: WorkerProcess) -> None:
        """Remove a worker, and kill what is left of its process group."""
        del self.workers[worker.index]
        worker.kill()
        worker.connection.close()

    def close(self) -> None:
        for worker in list(self.workers.values()):
            self.remove(worker)

    def shut_down(self) -> list[WorkerProcess]:
        """Let idle workers call shutdown(). Return the workers that did not end in time or ended with an error.

        Does not wait for workers whose init() has not returned.
        """
        ready = [worker for worker in self.workers.values() if worker.is_ready]
        for worker in ready:
            worker.send(None)
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        return [worker for worker in ready if worker.wait(max(0.0, deadline - time.monotonic())) != 0]


def find_gpus(limit: int | None) -> Sequence[str]:
    """Return CUDA_VISIBLE_DEVICES entries for `limit` GPUs, or if None for all visible GPUs, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in (visible or "").split(",") if name.strip() not in ("", "-1")]
    if visible is None and limit is None:
        command = ["nvidia-smi", "-L"]
        with suppress(OSError, subprocess.SubprocessError):  # not installed, or the driver does not respond
            listing = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
            limit = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    if limit is None:
        limit = len(names)
    return [names[index] if index < len(names) else str(index) for index in range(limit)]
