"""`batch-infer plan`: what a run would do, compared with what the run then does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from batch_infer.autotune import calibration
from batch_infer.errors import SettingsError
from batch_infer.models import read_card
from batch_infer.settings import Compute, ModelSettings, SafetySettings
from tests.deaths import eventually
from tests.runs import QUICK, command, results, run, run_json, wait_for
from tests.tables import write_csv

pytestmark = pytest.mark.usefixtures("probe_here")

LONG = "a red circle " * 40
MIXED: list[list[Any]] = [
    ["id", "prompt", "height", "num_inference_steps", "guidance_scale", "num_images_per_prompt"],
    ["a", "a red circle", "", 3, "", 2],
    ["b", LONG, "", 1, "", 1],
    ["c", "a green star", 72, 2, 1.0, 1],
    ["", "a red circle", 13, 5, 0, 1],
    ["d", "", 72, 4, 9.5, 1],
    ["d", LONG, "", 2, 2, 3],
    ["f", LONG, "", 2, 2, 3],
    ["e", "ü" * 200, 72, 9, "", 1],
]
DEVICE = ("--slots", "8", "--threads", "1", "--device", "cpu")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", MIXED)


def plan(table: Path | str, out: Path, *options: str | Path) -> dict[str, Any]:
    done = command("plan", table, "--out", out, *QUICK, "--json", *options)
    assert done.code in (0, 3), done.stderr
    return dict(json.loads(done.stdout))


def test_a_plan_agrees_with_the_run(table: Path, out: Path) -> None:
    planned = plan(table, out)
    assert not out.exists(), "a plan writes nothing"
    done = json.loads(run(table, out, "--json").stdout)
    made = results(out)
    assert planned["row_forwards"] == done["row_forwards"] == sum(size["row_forwards"] for size in planned["sizes"])
    assert planned["ticks"] == done["ticks"]
    assert planned["occupancy"] == pytest.approx(done["occupancy"], abs=1e-3)
    assert (planned["rows"], planned["total"], planned["pending"]) == (8, len(made), done["rendered"]) == (8, 11, 8)
    assert planned["truncated"] == len({row["id"] for row in made if row["prompt_truncated"]}) == 3
    output = [(fault["id"], fault["image_index"], fault["error"]) for fault in planned["invalid_results"]]
    assert output == [(row["id"], row["image_index"], row["error"]) for row in made if row["status"] == "invalid"]
    assert planned["invalid_rows"] == planned["invalid"] == len(output) == 3
    assert planned["seconds"] > 0
    assert planned["bytes"] > 0


def test_steps_that_the_scheduler_refuses_are_invalid_beforehand(tmp_path: Path, out: Path) -> None:
    """Only the scheduler knows which step counts it accepts."""
    rows: list[list[Any]] = [
        ["prompt", "num_inference_steps", "num_images_per_prompt"],
        ["x", 4, 1],
        ["x", 3, 2],
        ["x", 5, 1],
    ]
    table = write_csv(tmp_path / "t.csv", rows)
    options = ("--scheduler", "PNDMScheduler:skip_prk_steps=false")
    planned = plan(table, out, *options)
    assert run(table, out, *options).code == 3
    output = [(fault["id"], fault["image_index"], fault["error"]) for fault in planned["invalid_results"]]
    assert output == [
        (row["id"], row["image_index"], row["error"]) for row in results(out) if row["status"] == "invalid"
    ]
    assert (planned["invalid_rows"], planned["invalid"], planned["pending"]) == (1, 2, 2)
    assert planned["row_forwards"] == run_json(out)["summary"]["row_forwards"]


def test_two_evaluations_per_step_are_counted(table: Path, out: Path) -> None:
    options = ("--scheduler", "HeunDiscreteScheduler")
    planned = plan(table, out, *options)
    assert planned["row_forwards"] == json.loads(run(table, out, "--json", *options).stdout)["row_forwards"]


def test_finished_rows_are_not_planned(table: Path, out: Path) -> None:
    assert run(table, out, "--limit", "2").code == 0
    planned = plan(table, out)
    assert (planned["done"], planned["pending"]) == (3, 5)
    assert planned["row_forwards"] == json.loads(run(table, out, "--json").stdout)["row_forwards"]
    assert plan(table, out)["row_forwards"] == 0
    assert plan(table, out, "--overwrite")["pending"] == 8


def test_a_plan_prints_a_readable_report(table: Path, out: Path) -> None:
    done = command("plan", table, "--out", out, *QUICK, "--price-per-hour", "3600", "--limit", "7")
    assert done.code == 3
    lines = done.stdout.splitlines()
    assert f"3 of 7 rows are invalid; the first is {lines[0]}\n" in done.stderr
    assert lines[0] == f"{table}, line 5 (t-00000003): height '13' is not within 16 to 512"
    assert lines[1] == f"{table}, line 6 (d): the prompt is empty"
    assert lines[2] == f"{table}, line 7 (t-00000005): duplicate id 'd'"
    assert lines[3].startswith("7 rows, ")
    assert "3 invalid" in lines[3]
    assert lines[4] == f"read     {table}: 7 rows"
    assert [line.split()[0] for line in lines[5:]] == [
        "size", "64x64", "64x72", "slots", "time", "disk", "cost",
    ]  # fmt: skip


def test_read_and_ignored_files_are_listed(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "t"
    for name, rows in (("a.csv", 2), ("b.csv", 0), ("README.csv", 1), ("c.zip", 1)):
        write_csv(folder / name, [["prompt"], *([["x"]] * rows)])
    (folder / "bad.parquet").write_bytes(b"PAR1")
    done = command("plan", folder, "--out", out, *QUICK)
    assert [line for line in done.stdout.splitlines() if line.startswith("read")] == [
        f"read     {folder}/{name}" for name in ("a.csv: 2 rows", "b.csv: 0 rows", "bad.parquet: 1 row")
    ]
    sentence = f"files ignored for their names: {folder}/README.csv; for their endings: {folder}/c.zip\n"
    assert sentence in done.stderr
    planned = plan(folder, out)
    assert planned["files"] == {
        f"{folder}/{name}": rows for name, rows in (("a.csv", 2), ("b.csv", 0), ("bad.parquet", 1))
    }
    assert planned["left_out"] == {"name": {f"{folder}/README.csv": 1}, "ending": {f"{folder}/c.zip": 1}}
    assert sentence in run(folder, out).stderr


def test_a_plan_within_the_failure_budget_succeeds(table: Path, out: Path) -> None:
    done = command("plan", table, "--out", out, *QUICK, "--max-failed", "3", "-q")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")


def test_a_table_without_a_valid_row_has_no_cost(tmp_path: Path, out: Path) -> None:
    planned = plan(write_csv(tmp_path / "t.csv", [["prompt"], [""]]), out)
    assert (planned["rows"], planned["invalid"], planned["row_forwards"], planned["sizes"]) == (1, 1, 0, [])
    assert plan(write_csv(tmp_path / "u.csv", [["prompt"]]), out)["rows"] == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--steps", "0"), "num_inference_steps '0' is not within"),
        (("--model", "/nowhere"), "/nowhere is neither a model folder nor"),
        (("--scheduler", "NoScheduler"), "diffusers has no scheduler NoScheduler"),
        (("--scheduler", "DDIMScheduler:clip_sample=true"), "clip_sample=true is not supported"),
    ],
)
def test_a_plan_refuses_what_a_run_would_refuse(
    table: Path, out: Path, options: tuple[str, ...], sentence: str
) -> None:
    for done in (command("plan", table, "--out", out, *QUICK, *options), run(table, out, *options)):
        assert (done.code, done.stdout) == (2, "")
        assert sentence in done.stderr


def test_plan_refuses_to_overwrite_files_of_another_program(table: Path, out: Path) -> None:
    (out / "images").mkdir(parents=True)
    for done in (command("plan", table, "--out", out, *QUICK, "--overwrite"), run(table, out, "--overwrite")):
        assert done.code == 2
        assert "has no run.json written by batch-infer" in done.stderr


def test_another_model_on_the_same_out_is_refused(table: Path, out: Path, sd1_folder: Path) -> None:
    assert run(table, out, "--limit", "1").code == 0
    done = command("plan", table, "--out", out, *QUICK, "--model", sd1_folder)
    assert done.code == 2
    assert "was made with model" in done.stderr


PLANNING = """
import re, sys
from pathlib import Path
from batch_infer.__main__ import main
if __name__ == "__main__":
    sys.argv = ["batch-infer", "plan", *sys.argv[1:]]
    try:
        main()
    except SystemExit as end:
        loaded = sorted({"torch", "diffusers", "accelerate", "pandas"} & sys.modules.keys())
        # Not the maximum of getrusage, which includes the memory of the parent process.
        peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        print(end.code, loaded, peak, file=sys.stderr)
"""
"""Run the command as a script, since it starts a process. Print the libraries that it loads and its peak memory."""


def plan_in_subprocess(table: Path, folder: Path) -> tuple[dict[str, Any], str, int]:
    """Run a plan in a separate process. Return its output, the rendering libraries it loads, and its peak in KiB."""
    script = folder / "planning.py"
    script.write_text(PLANNING)
    line: list[str | Path] = [
        sys.executable,
        script,
        table,
        "--out",
        folder / "none",
        "--json",
        "--steps",
        "2",
        *DEVICE,
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=600)
    _, loaded, peak = done.stderr.splitlines()[-1].split(" ", 2)
    return json.loads(done.stdout), loaded, int(peak)


@pytest.mark.promises
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_plan_imports_no_torch(table: Path, tmp_path: Path) -> None:
    """A separate process provides the facts that only torch knows."""
    planned, loaded, _ = plan_in_subprocess(table, tmp_path)
    assert (planned["pending"], loaded) == (8, "[]")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("few", "many", "mib"),
    [
        pytest.param(500, 20_000, 40, marks=pytest.mark.promises),
        pytest.param(10_000, 1_000_000, 200, marks=pytest.mark.soak),
    ],
)
def test_the_memory_of_a_plan_does_not_grow_with_the_table(tmp_path: Path, few: int, many: int, mib: int) -> None:
    peaks = []
    for count in (few, many):
        rows = ([f"a red circle number {i}, " + "and more " * (i % 20), i % 7 + 1, "x"] for i in range(count))
        table = write_csv(tmp_path / f"{count}.csv", [["prompt", "num_inference_steps", "tag"], *rows])
        planned, _, peak = plan_in_subprocess(table, tmp_path)
        assert (planned["rows"], planned["invalid"]) == (count, 0)
        peaks.append(peak)
    assert peaks[1] - peaks[0] < mib * 1024


def test_a_device_with_too_little_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is not torch's own, which the parent process could not receive without importing torch."""

    def too_small(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr(calibration, "_load_model", too_small)
    compute = Compute("cpu", "float32", slots=8, decode_batch=4, threads=1)
    with pytest.raises(SettingsError, match=r"the model does not fit .*.* \(CUDA out of memory\)"):
        calibration.measure_rates(read_card(ModelSettings()), compute, SafetySettings(), "png", (64, 64))


@pytest.mark.promises
def test_many_sizes_are_estimated_from_a_few_measured_ones(tmp_path: Path, out: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt", "height"], *(["x", 64 + 8 * k] for k in range(7))])
    sizes = plan(table, out)["sizes"]
    assert [size["height"] for size in sizes] == [64 + 8 * k for k in range(7)]
    assert all(size["seconds"] > 0 for size in sizes)


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def has_loaded_torch(process: int) -> bool:
    return "libtorch" in Path(f"/proc/{process}/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.promises
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_killed_plan_leaves_no_process(table: Path, out: Path, number: signal.Signals) -> None:
    line: list[str | Path] = [
        sys.executable,
        "-m",
        "batch_infer",
        "plan",
        table,
        "--out",
        out,
        "--device",
        "cpu",
        "--steps",
        "7",
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as plan:
        assert wait_for(plan, lambda: len(children(plan)) > 1)  # that of multiprocessing, and the probe
        started = children(plan)
        assert wait_for(plan, lambda: any(has_loaded_torch(pid) for pid in started))
        os.killpg(plan.pid, number) if number == signal.SIGINT else plan.send_signal(number)
        _, stderr = plan.communicate(timeout=600)
        assert plan.returncode == (75 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert "Traceback" not in stderr
        assert "batch-infer: stopped by SIGINT" in stderr
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
