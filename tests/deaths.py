"""Kill workers, the parent or all processes of runs at random."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch_infer.records import BOOKKEEPING
from tests.paced import MODULE
from tests.runs import results, run, start
from tests.tables import write_csv

SPAWNED = b"spawn_main"
"""Part of the command line of a worker's process."""

COLOURS = ("red", "green", "blue", "yellow")


def die_at(step: int) -> None:
    """Kill this process just before its n-th call that changes the disk."""
    left = [step]

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "mkdir"), (Path, "unlink"), (Path, "write_bytes")):
        setattr(owner, name, deadly(getattr(owner, name)))


def workers_of(parent: int) -> list[int]:
    """Return the ids of the worker processes of a run."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [int(child) for child in children if SPAWNED in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:  # a process has just ended
        return []


def is_alive(process: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


@dataclass
class Killer:
    """Starts a run again and again, and kills some of its processes after each new part."""

    table: Path
    out: Path
    options: tuple[str, ...]
    draw: random.Random
    killed: list[str] = field(default_factory=list)

    def kill(self, times: int) -> None:
        """Start runs until this many kills have been made."""
        while len(self.killed) < times:
            with self._run() as process:
                while len(self.killed) < times and self._wait_for_part(process):
                    time.sleep(self.draw.uniform(0, 0.5))
                    if not self._kill_target(process):
                        break
                if len(self.killed) < times and process.poll() == 0:
                    raise AssertionError(f"the run ended after {self.killed}")

    def _kill_target(self, run: subprocess.Popen[str]) -> bool:
        """Kill a worker, the parent or all processes, and return whether the run continues."""
        target = self.draw.choice(["worker", "parent", "all"])
        workers = workers_of(run.pid)
        if target == "worker":
            if not workers:
                return run.poll() is None
            os.kill(self.draw.choice(workers), signal.SIGKILL)
        elif target == "parent":
            run.kill()
            run.wait()
            assert eventually(lambda: not any(map(is_alive, workers))), "workers outlive their parent"
        else:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        self.killed.append(target)
        return target == "worker"

    def _wait_for_part(self, run: subprocess.Popen[str]) -> bool:
        """Wait for the next part. Return False if the run ends first."""
        before = self._parts()
        return eventually(lambda: self._parts() > before or run.poll() is not None) and run.poll() is None

    def _parts(self) -> int:
        return len(list((self.out / "manifest").glob("part-*.parquet")))

    @contextmanager
    def _run(self) -> Iterator[subprocess.Popen[str]]:
        with start(self.table, self.out, *self.options, program=MODULE, session=True, PACE_SECONDS="0.2") as run:
            try:
                yield run
            finally:
                if run.poll() is None and len(self.killed):
                    os.killpg(run.pid, signal.SIGKILL)


def eventually(condition: Callable[[], object], seconds: float = 300) -> bool:
    """Wait for a condition, and return whether it became true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def write_prompts(folder: Path, rows: int) -> Path:
    cells = [["prompt", "id", "num_inference_steps", "guidance_scale"]]
    cells += [
        [f"a {COLOURS[k % 4]} circle", f"r{k}", str(10 + k % 10), "1" if k % 5 == 0 else "5"] for k in range(rows)
    ]
    return write_csv(folder / "table.csv", cells)


def render_undisturbed(table: Path, out: Path) -> list[dict[str, Any]]:
    assert run(table, out, "--slots", "16").code == 0
    return without_bookkeeping(out)


def without_bookkeeping(out: Path) -> list[dict[str, Any]]:
    return [{name: cell for name, cell in row.items() if name not in BOOKKEEPING} for row in results(out)]
