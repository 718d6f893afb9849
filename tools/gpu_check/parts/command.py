"""Check that `batch-infer run` writes equal bytes after `kill -9` and a resume, and with rows in another order."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow.parquet as pq

from batch_infer.bench.workload import PROMPTS

if TYPE_CHECKING:
    from tools.gpu_check.recorder import Recorder

SMALL_TABLE = 40, (4, 6)
"""Number of rows and range of steps on a CPU: enough to outlast the first commit, after three seconds."""
RUN_SECONDS = 600
"""Time limit of one command in seconds. The part's limit usually ends it earlier."""
SMALL_OPTIONS = ("--slots", "4", "--no-compile", "--threads", "1", "--num-processes", "0")


def run(recorder: Recorder) -> None:
    """Run the command uninterrupted, killed and resumed, and in another order, and compare the results."""
    folder = recorder.scratch / "command"
    folder.mkdir(parents=True)
    rows = make_rows(*SMALL_TABLE) if recorder.small else make_rows(700, (20, 50))
    shuffled = rows[:]
    random.Random(4).shuffle(shuffled)
    table, other_table = write_table(folder / "rows.csv", rows), write_table(folder / "shuffled.csv", shuffled)
    with (folder / "log.txt").open("w+b") as log, Commands(recorder, folder, log) as commands:
        expected: dict[Any, Any] = {}
        # The first two runs are parallel to save time, because nothing is timed.
        uninterrupted = commands.start(table, "uninterrupted")
        with recorder.section("killed and resumed") as results:
            results |= commands.kill_and_resume(table, "resumed")
            results["uninterrupted_exit_code"] = uninterrupted.wait(RUN_SECONDS)
            expected = read_results(folder / "uninterrupted")
            results |= compare(expected, read_results(folder / "resumed"))
        with recorder.section("uninterrupted") as results:
            results |= {"rows": len(expected), "statuses": sorted({status for status, _ in expected.values()})}
            record = json.loads((folder / "uninterrupted" / "run.json").read_text("utf-8"))
            results |= {name: record[name] for name in ("compute", "summary")}
        if not recorder.small:
            with recorder.section("other order") as results:
                results["exit_code"] = commands.start(other_table, "shuffled", "uninterrupted").wait(RUN_SECONDS)
                results |= compare(expected, read_results(folder / "shuffled"))
        log.seek(0)
        print(log.read().decode(errors="replace")[-4000:])


def make_rows(count: int, steps: tuple[int, int]) -> list[list[object]]:
    """Make rows with random prompts, steps and guidance, the same ones on every call."""
    draw = random.Random(11)
    return [
        [f"id{k:04d}", draw.choice(PROMPTS), k, draw.randint(*steps), 5 if draw.random() < 0.8 else 1]
        for k in range(count)
    ]


def write_table(path: Path, rows: list[list[object]]) -> Path:
    """Write rows as CSV and return the path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "seed", "num_inference_steps", "guidance_scale"])
        writer.writerows(rows)
    return path


def read_results(out: Path) -> dict[Any, Any]:
    """Return the status and SHA-256 of each image by row id and image index."""
    rows = pq.read_table(out / "results.parquet").to_pylist()
    return {(row["id"], row["image_index"]): (row["status"], row["sha256"]) for row in rows}


def compare(expected: dict[Any, Any], actual: dict[Any, Any]) -> dict[str, Any]:
    """Count images with equal status and bytes."""
    different = [key for key in expected if expected[key] != actual.get(key)]
    return {"images": len(expected), "equal": len(expected) - len(different), "first_different": different[:5]}


class Commands:
    """Starts `python -m batch_infer run` as a user would, compiled on a GPU. Kills running commands on exit."""

    def __init__(self, recorder: Recorder, folder: Path, log: IO[bytes]) -> None:
        self._folder, self._log = folder, log
        options = SMALL_OPTIONS if recorder.small else ("--slots", "32", "--compile")
        self._options = ["--device", recorder.device, *options, "-q"]
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            kill_group(process)

    def start(self, table: Path, out: str, cache: str | None = None) -> subprocess.Popen[bytes]:
        """Start the command in a new process group.

        `cache`: the earlier run whose compiled code it uses. By default, it compiles again.
        """
        folder, caches = self._folder / out, self._folder / f"cache-{cache or out}"
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "XDG_CACHE_HOME": str(caches / "user"),
        }
        arguments = [sys.executable, "-m", "batch_infer", "run", str(table), "-o", str(folder), *self._options]
        process = subprocess.Popen(
            arguments, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )
        self._started.append(process)
        return process

    def kill_and_resume(self, table: Path, out: str) -> dict[str, Any]:
        """Kill the command and its workers once the manifest has a part, then run the command again."""
        manifest = self._folder / out / "manifest"
        process = self.start(table, out)
        deadline = time.monotonic() + RUN_SECONDS
        while process.poll() is None and time.monotonic() < deadline and not any(manifest.glob("part-*.parquet")):
            time.sleep(0.02)
        killed = process.poll() is None
        kill_group(process)
        images = sum(pq.read_metadata(part).num_rows for part in manifest.glob("part-*.parquet"))
        code = self.start(table, out).wait(RUN_SECONDS)
        return {"killed_while_running": killed, "images_before_the_kill": images, "exit_code": code}


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and its workers, if they are still running, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
