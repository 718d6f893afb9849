"""Run the command and read what it leaves in OUT."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from batch_infer.__main__ import main
from batch_infer.images import hash_pixels
from batch_infer.settings import ComputeSettings, ModelSettings, RowDefaults, RunSettings, SafetySettings, TableSettings
from tests.tables import to_rows

QUICK = ("--steps", "2", "--slots", "8", "--threads", "1", "--device", "cpu", "--on-flagged", "keep",
         "--num-processes", "0")  # fmt: skip
"""Few steps, on the CPU, with flagged images kept, and without worker processes, which would import all libraries."""
Key = tuple[str, int]


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str


def command(*arguments: str | Path) -> CommandResult:
    """Run the command in this process, which has loaded torch."""
    log = logging.getLogger("batch_infer")
    before = log.handlers, log.level, log.propagate
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with (
            mock.patch.object(sys, "argv", ["batch-infer", *map(str, arguments)]),
            redirect_stdout(stdout),
            redirect_stderr(stderr),
        ):
            main()
    except SystemExit as end:
        return CommandResult(end.code if isinstance(end.code, int) else 0, stdout.getvalue(), stderr.getvalue())
    finally:
        log.handlers, log.level, log.propagate = before
    raise AssertionError("main returned instead of ending the process")


def run(table: Path | str, out: Path | str, *options: str | Path) -> CommandResult:
    """Run `batch-infer run` with few steps; a later option replaces an earlier one."""
    return command("run", table, "--out", out, *QUICK, *options)


def start(
    table: Path,
    out: Path | str,
    *options: str,
    program: tuple[str, ...] = ("-m", "batch_infer"),
    session: bool = False,
    **environment: str,
) -> subprocess.Popen[str]:
    """Start `run` in a new process. With `session`, the process leads its own group, which tests can signal."""
    line = [sys.executable, *program, "run", str(table), "--out", str(out), *QUICK, *options]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=session, env={**os.environ, **environment})  # fmt: skip


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], *, seconds: float = 600) -> bool:
    """Wait until a condition holds. Returns False if the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return condition()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)
    return True


def results(out: Path) -> list[dict[str, Any]]:
    return to_rows(pq.read_table(out / "results.parquet"))


def run_json(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run.json").read_text("utf-8")))


def hashes(out: Path) -> dict[Key, str | None]:
    """Return the sha256 of each image by id and index; no key may occur twice."""
    rows = results(out)
    hash_by_key = {(row["id"], row["image_index"]): row["sha256"] for row in rows}
    assert len(hash_by_key) == len(rows)
    return hash_by_key


def images(out: Path) -> set[str]:
    """Return the files under images/ and quarantine/, relative to OUT."""
    return {path.relative_to(out).as_posix() for folder in ("images", "quarantine")
            for path in (out / folder).rglob("*") if path.is_file()}  # fmt: skip


def assert_whole(out: Path) -> None:
    """Check that every image in the results is intact, and that there is no other file."""
    rows = [row for row in results(out) if row["generated_image"]]
    assert images(out) == {row["generated_image"] for row in rows}
    assert len(images(out)) == len(rows)
    for row in rows:
        content = (out / row["generated_image"]).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (row["sha256"], row["image_bytes"])
        if row["generated_image"].endswith(".png"):
            with Image.open(io.BytesIO(content)) as image:
                # None for an image from a version without this column
                assert row["pixels_sha256"] in (None, hash_pixels(np.asarray(image)))
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


def settings_of(table: Path, out: Path) -> RunSettings:
    """Return the settings of `run` above, except the slots."""
    return RunSettings(
        TableSettings((str(table),)),
        str(out),
        model=ModelSettings(device="cpu"),
        compute=ComputeSettings(threads=1, processes=0),
        defaults=RowDefaults(num_inference_steps=2),
        safety=SafetySettings(on_flagged="keep"),
    )
