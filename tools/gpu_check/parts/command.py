"""The `batch-infer run` command: equal bytes after `kill -9` and a resume, and with the rows in another order."""

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

from batch_infer.jobs.bench.rows import PROMPTS

if TYPE_CHECKING:
    from tools.gpu_check.recorder import Recorder

SMALL_TABLE = 50, (4, 6)
"""Rows and steps on a CPU: enough to outlast the first commit, which comes after three seconds."""
RUN_SECONDS = 600
"""Time limit of one command; the part's own limit usually ends it earlier."""
SMALL_OPTIONS = ("--slots", "4", "--no-compile", "--threads", "1", "--num-processes", "0")


def run(recorder: Recorder) -> None:
    """Run the command uninterrupted, killed and resumed, and in another order; compare the results."""
    folder = recorder.scratch / "command"
    folder.mkdir(parents=True)
    rows = make_rows(*SMALL_TABLE) if recorder.small else make_rows(700, (20, 50))
    shuffled = rows[:]
    random.Random(4).shuffle(shuffled)
    table, other_table = write_table(folder / "rows.csv", rows), write_table(folder / "shuffled.csv", shuffled)
    with (folder / "log.txt").open("w+b") as log:
        command = Command(recorder, folder, log)
        with recorder.section("uninterrupted") as results:
            results |= command.finish(table, "uninterrupted")
            expected = read_results(folder / "uninterrupted")
            results |= {"rows": len(expected), "statuses": sorted({status for status, _ in expected.values()})}
            record = json.loads((folder / "uninterrupted" / "run.json").read_text("utf-8"))
            results |= {name: record[name] for name in ("compute", "summary")}
        with recorder.section("killed and resumed") as results:
            results |= command.kill_and_resume(table, "resumed")
            results |= compare(expected, read_results(folder / "resumed"))
        if not recorder.small:
            with recorder.section("other order") as results:
                results |= command.finish(other_table, "shuffled")
                results |= compare(expected, read_results(folder / "shuffled"))
        log.seek(0)
        print(log.read().decode(errors="replace")[-4000:])


def make_rows(count: int, steps: tuple[int, int]) -> list[list[object]]:
    """Make rows of random prompts, steps and guidance, the same each time."""
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
    """Return status and SHA-256 of each image by row id and image index."""
    rows = pq.read_table(out / "results.parquet").to_pylist()
    return {(row["id"], row["image_index"]): (row["status"], row["sha256"]) for row in rows}


def compare(expected: dict[Any, Any], actual: dict[Any, Any]) -> dict[str, Any]:
    """Count images with equal status and bytes."""
    different = [key for key in expected if expected[key] != actual.get(key)]
    return {"images": len(expected), "equal": len(expected) - len(different), "first_different": different[:5]}


class Command:
    """Starts `python -m batch_infer run` as a user would. Compiled on a GPU, by a new compiler cache for each `out`."""

    def __init__(self, recorder: Recorder, folder: Path, log: IO[bytes]) -> None:
        self._folder, self._log = folder, log
        options = SMALL_OPTIONS if recorder.small else ("--slots", "32", "--compile")
        self._options = ["--device", recorder.device, *options, "-q"]

    def start(self, table: Path, out: str) -> subprocess.Popen[bytes]:
        """Start the command in a process group of its own."""
        folder = self._folder / out
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}-inductor",
            "TRITON_CACHE_DIR": f"{folder}-triton",
            "XDG_CACHE_HOME": f"{folder}-cache",
        }
        arguments = [sys.executable, "-m", "batch_infer", "run", str(table), "-o", str(folder), *self._options]
        return subprocess.Popen(arguments, env=environment, stdout=self._log, stderr=self._log, start_new_session=True)

    def finish(self, table: Path, out: str) -> dict[str, Any]:
        """Run the command to its end and return its exit code and seconds."""
        started = time.monotonic()
        process = self.start(table, out)
        try:
            code = process.wait(RUN_SECONDS)
        finally:
            kill_group(process)
        return {"exit_code": code, "seconds": round(time.monotonic() - started, 1)}

    def kill_and_resume(self, table: Path, out: str) -> dict[str, Any]:
        """Kill the command and its workers once the manifest has its first part, then run it again."""
        manifest = self._folder / out / "manifest"
        process = self.start(table, out)
        try:
            deadline = time.monotonic() + RUN_SECONDS
            while process.poll() is None and time.monotonic() < deadline and not any(manifest.glob("part-*.parquet")):
                time.sleep(0.02)
            killed = process.poll() is None
        finally:
            kill_group(process)
        images = sum(pq.read_metadata(part).num_rows for part in manifest.glob("part-*.parquet"))
        return {"killed_while_running": killed, "images_before_the_kill": images, **self.finish(table, out)}


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and its workers, and wait for it. Does nothing where the group has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
