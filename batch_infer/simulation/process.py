"""A worker as the driver sees it: a process with a folder and a log of its own, and a link to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import batch_infer
from batch_infer.simulation.connection import received, send
from batch_infer.simulation.messages import Duty, FromWorker, MiniBatch, ToWorker
from batch_infer.store import temporary_file_errors

PATIENT_SECONDS = 10.0
"""How long a process is waited for that has been killed."""
SIMULATED, TIMED_OUT = "killed, as --kill asks", "killed, for it took longer than --timeout"
PROGRAM = "import sys; sys.path.append({root!r}); from batch_infer.simulation.worker import live; live({link})"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker lives: its number, its working folder, its log, and what it finds in its environment."""

    index: int
    folder: Path
    log: Path
    environment: Mapping[str, str]


@dataclass(slots=True)
class Assignment:
    """A mini-batch that a worker has; since when it runs it, and when it is to be killed for a simulated fault."""

    mini_batch: MiniBatch
    kill_after: float | None = None
    began: float | None = None

    def due(self, timeout: float) -> tuple[float, str] | None:
        """When its worker is to be killed if it goes on like this, and why."""
        if self.began is None:
            return None
        if self.kill_after is not None and self.kill_after < timeout:
            return self.began + self.kill_after, SIMULATED
        return self.began + timeout, TIMED_OUT


class WorkerProcess:
    """A worker's process, from its start to its end."""

    def __init__(self, place: Place, duty: Duty) -> None:
        self.place = place
        self.ready = False
        self.assignment: Assignment | None = None
        self.fate = ""
        """Why it was killed, where it was."""
        self.link, theirs = Pipe()
        with temporary_file_errors():
            place.folder.mkdir()
        try:
            self._process = _start(place, theirs)
        finally:
            theirs.close()  # so that ours says when the process has ended
        self.send(duty)

    def send(self, message: ToWorker) -> None:
        """To a worker that has died it goes nowhere: its link's other direction says so."""
        send(self.link, message)

    def receive(self) -> Iterator[FromWorker]:
        """What it has said since. Raises EOFError where it has died and said all."""
        yield from received(self.link)
        if self._process.poll() is not None and not self.link.poll():  # its children may hold the link open
            raise EOFError

    def kill(self, fate: str = "killed") -> None:
        """End it at once, with all that it has started; what it has sent before can still be received."""
        self.fate = self.fate or fate
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait(PATIENT_SECONDS)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, in so many seconds at most."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return bool(self._process.returncode)

    def bury(self) -> None:
        """Leave nothing of it behind but its log."""
        self.kill()
        self.link.close()

    def told_fate(self) -> str:
        """How it ended."""
        self.wait(PATIENT_SECONDS)
        code = self._process.returncode
        if self.fate or code is None:
            return self.fate or "it closed its connection"
        if code >= 0:
            return f"its process ended with exit code {code}"
        return f"its process was killed by {signal.Signals(-code).name}"


def _start(place: Place, link: Connection) -> subprocess.Popen[bytes]:
    """Start the process in a session of its own: Ctrl-C is the driver's, which then ends it."""
    root = str(Path(batch_infer.__file__).parent.parent)
    with place.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-u", "-c", PROGRAM.format(root=root, link=link.fileno())],
            cwd=place.folder,
            env=dict(place.environment),
            pass_fds=[link.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def end(workers: Collection[WorkerProcess], seconds: float) -> list[WorkerProcess]:
    """Let workers end in order that have nothing to do, and return those that have not, in this time or with an error.

    One whose init() is still under way is not waited for.
    """
    ready = [worker for worker in workers if worker.ready]
    for worker in ready:
        worker.send(None)
    deadline = time.monotonic() + seconds
    return [worker for worker in ready if not worker.wait(max(0.0, deadline - time.monotonic())) or worker.failed]
