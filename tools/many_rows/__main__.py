"""Measure the commands on an OUT with many rows: `python -m tools.many_rows FOLDER --rows 1000000`.

The rows and results are synthetic; only one image is rendered, to create run.json. Without --images, there are no other
image files. If FOLDER is new, creating OUT takes about three minutes per million rows. Each command runs in a separate
process, and its time and peak memory are printed. With --images, `verify` is compared with sha256sum over the same
images.
"""

# Linux counts the memory of the parent at the start of a child as the child's, so this process imports nothing large.
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.many_rows.commands import BATCH_INFER, HASH, OPEN_INDEX, OUT, PLAN, RUN


def measure(name: str, command: Sequence[str], folder: Path) -> float:
    """Run a command, print its time, peak memory and exit code, and return the seconds."""
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder) as process:
        errors = process.stderr.read() if process.stderr else b""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    print(f"{name:20} {seconds:8.1f} s {usage.ru_maxrss / 1024:8.0f} MiB   exit code {process.returncode}", flush=True)
    if process.returncode not in (0, 3):
        print(errors.decode(errors="replace")[-2000:], file=sys.stderr)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--images", action="store_true", help="write an image file of 4 to 8 kB for each row")
    parser.add_argument("--no-plan", action="store_true", help="leave out `plan`, which reads all rows")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if not (folder / OUT).exists():
        folder.mkdir(parents=True, exist_ok=True)
        make = [sys.executable, "-m", "tools.many_rows.make", str(folder), str(arguments.rows), str(arguments.images)]
        subprocess.run(make, check=True)
    print(f"{len(list((folder / OUT / 'manifest').glob('part-*'))):,} manifest parts")
    measure("open the index", OPEN_INDEX, folder)
    measure("merge", [*BATCH_INFER, "merge", OUT], folder)
    measure("run, nothing to do", RUN, folder)
    measure("status", [*BATCH_INFER, "status", OUT], folder)
    measure("verify --quick", [*BATCH_INFER, "verify", OUT, "--quick"], folder)
    if arguments.images:
        limit = str(arguments.rows)
        measure("gallery", [*BATCH_INFER, "gallery", OUT, "--max-results", limit], folder)
        measure("gallery, again", [*BATCH_INFER, "gallery", OUT, "--max-results", limit], folder)
        measure("sha256sum, cold", HASH, folder)
        seconds = measure("verify", [*BATCH_INFER, "verify", OUT], folder)
        print(f"{seconds / measure('sha256sum', HASH, folder):.2f} times the time of sha256sum")
    if not arguments.no_plan:
        measure("plan", PLAN, folder)


if __name__ == "__main__":
    main()
