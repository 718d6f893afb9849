"""Run the parts as subprocesses with time limits: untimed parts in parallel, then timed parts one by one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tools.gpu_check.environment import ROOT
from tools.gpu_check.outputs import Outputs
from tools.gpu_check.plan import NEEDS_CUDA, Part

POLL_SECONDS = 0.2
TERMINATION_SECONDS = 5.0
"""Seconds between SIGTERM and SIGKILL."""
PARALLEL_COMPILE_THREADS = 3


@dataclass
class Running:
    """A part's process."""

    part: Part
    process: subprocess.Popen[bytes]
    started: float

    def stop(self) -> None:
        """End the process and its process group."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(TERMINATION_SECONDS)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Orchestrator:
    """Runs parts within a total time limit, and records how each part ended, including crashes and timeouts."""

    def __init__(self, device: str, seconds: float, outputs: Outputs, environment: dict[str, str]) -> None:
        self._device, self._outputs, self._environment = device, outputs, environment
        self._started = time.monotonic()
        self._deadline = self._started + seconds

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def run(self, parts: Sequence[Part]) -> None:
        """Run the untimed parts in parallel (on a CPU one by one), and then the timed parts one by one."""
        untimed = [part for part in parts if not part.timed]
        timed = [part for part in parts if part.timed]
        for group in [untimed] if self._device == "cuda" else [[part] for part in untimed]:
            self._run_together(group, PARALLEL_COMPILE_THREADS if len(group) > 1 else None)
        for part in timed:
            self._run_together([part], None)

    def _run_together(self, parts: Sequence[Part], compile_threads: int | None) -> None:
        running = [process for part in parts if (process := self._start(part, compile_threads)) is not None]
        try:
            while running:
                time.sleep(POLL_SECONDS)
                running = [process for process in running if not self._has_ended(process)]
                self._outputs.refresh()
        finally:
            for process in running:
                process.stop()

    def _start(self, part: Part, compile_threads: int | None) -> Running | None:
        """Start a part, or record why it is skipped."""
        remaining = self._deadline - time.monotonic()
        reason = None
        if self._device not in part.devices:
            reason = NEEDS_CUDA
        elif (limit := part.limit_on(self._device)) > remaining:
            reason = f"its time limit of {limit:.0f} s does not fit into the remaining {remaining:.0f} s"
        if reason is not None:
            self._report(part, f"skipped: {reason}")
            self._outputs.update(part.name, skipped=reason)
            return None
        arguments = [part.name, self._device, str(self._outputs.scratch), str(self._outputs.out)]
        environment = dict(self._environment)
        if compile_threads is not None:
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = str(compile_threads)
        with self._outputs.log_file(part.name).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tools.gpu_check.child", *arguments],
                cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._outputs.update(part.name, status="running")
        return Running(part, process, time.monotonic())

    def _has_ended(self, running: Running) -> bool:
        """Return whether a part has ended. Stop it at its time limit, and record how it ended."""
        seconds = time.monotonic() - running.started
        code = running.process.poll()
        if code is None and seconds < running.part.limit_on(self._device):
            return False
        running.stop()
        status = "timeout" if code is None else "ok" if code == 0 else "failed"
        self._report(running.part, f"{status}, {seconds:.0f} s")
        self._outputs.update(running.part.name, status=status, exit_code=code, seconds=round(seconds, 1))
        return True

    def _report(self, part: Part, text: str) -> None:
        print(f"[{self.elapsed:5.0f} s] {part.name}: {text}", flush=True)
