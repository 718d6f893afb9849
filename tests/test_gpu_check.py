"""Test the GPU check: its report, its time limits, and the parts that a CPU can run."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import batch_infer
from tools.gpu_check.__main__ import main
from tools.gpu_check.environment import ROOT, make_environment, write_metadata
from tools.gpu_check.evaluation import evaluate
from tools.gpu_check.orchestrator import Orchestrator
from tools.gpu_check.outputs import Outputs
from tools.gpu_check.plan import Part, select_parts
from tools.gpu_check.profiling import Kernel, longest, summarize
from tools.gpu_check.report import format_report, format_summary

INVARIANT = {
    "finite": True,
    "repeatable": True,
    "same_at_other_positions": True,
    "same_among_other_rows": True,
}
UNET = {"slots": 32, "row_forwards_per_second": 500.0, "tflops": 345.6, "host_ms": 12.5, "ms": 64.0}
BENCH = {
    "batch-infer": {"images_per_second": 4.321, "mfu": 0.414, "mfu_of_matmul": 0.5},
    "grouped": {"images_per_second": 2.5, "mfu": 0.24, "mfu_of_matmul": 0.3},
}


def make_results() -> dict[str, Any]:
    """Return results of a check whose parts ended in every possible way."""
    memory = {"shape_at_first": [4096, 8], "shape_at_the_end": [256, 8], "equal": 10, "images": 10, "rows": 10}
    attention = {"default": {"tflops": 320.0}, "flash": {"tflops": 321.0}, "cudnn": {"unsupported": "no such head"}}
    slots = {"row_forwards_per_second": 100.0, "tflops": 80.0, "peak_gib": 3.5, "ms": 40.0}
    parts = {
        "invariance-sd15": {
            "status": "ok",
            "sections": {"first images": {"compiled": True}, "unet, compiled": INVARIANT, "unet, eager": INVARIANT},
        },
        "invariance-sdxl": {
            "status": "ok",
            "sections": {
                "first images": {"compiled": True},
                "unet, compiled": INVARIANT | {"same_at_other_positions": False},
            },
        },
        "invariance-decidiffusion": {"status": "timeout", "sections": {}},
        "bench-sd15": {
            "status": "ok",
            "seconds": 61.2,
            "sections": {
                "bench": {"contenders": BENCH},
                "bare unet": UNET,
                "decoder": {"images_per_second": 120.0},
                "profile": {"gpu_idle_share": 0.0123},
            },
        },
        "bench-sdxl": {"status": "failed", "sections": {"bench": {"error": "Traceback\nRuntimeError: a | b"}}},
        "memory": {"status": "ok", "sections": {"too many slots": memory}},
        "attention": {"status": "ok", "sections": {"n32 h8 q4096 k4096 d40": attention}},
        "slots": {"status": "ok", "sections": {"throughput": {"4": slots}, "auto": {"slots": 32, "seconds": 9.5}}},
        "ceilings": {"skipped": "its time limit of 30 s does not fit into the remaining 12 s"},
    }
    return {"started_at": "2026-01-01T00:00:00Z", "device": "cuda", "machine": {"gpu": "NVIDIA H100"}, "parts": parts}


def test_report_has_a_table_of_checks_and_one_of_throughput() -> None:
    report = format_report(make_results())
    assert "gpu NVIDIA H100" in report
    assert "| batch invariance, sd15 | passed | unet, compiled; unet, eager |" in report
    assert "| batch invariance, sdxl | FAILED | violated: unet, compiled: same_at_other_positions |" in report
    assert "| batch invariance, decidiffusion | not measured | the part's status is timeout |" in report
    assert "| sd15 | 32 | 4.321 | 41.4 % | 50.0 % | 2.5 | 345.6 | 12.5 | 120 | 1.2 % |" in report
    assert "| n32 h8 q4096 k4096 d40 | 320 | 321 | – | – |" in report
    assert "| 4 | 100 | 80 | 3.5 |" in report
    assert "`--slots auto` chooses 32 slots" in report
    assert "slots and decoder batch [4096, 8] became [256, 8]; 10 of 10 rows with equal images" in report
    assert "| bench-sdxl | failed | bench: RuntimeError: a \\| b |" in report
    assert "| ceilings | skipped | its time limit of 30 s does not fit" in report
    widths = [len(table.splitlines()[0].split(" | ")) for table in report.split("\n\n") if table.startswith("|")]
    assert widths == [3, 10, 4, 5, 3]


def test_summary_names_every_part_and_what_failed() -> None:
    results = make_results()
    summary = format_summary(results)
    assert all(name in summary for name in results["parts"])
    assert summary.count("FAILED") == 1


def test_an_image_that_differs_fails_its_check() -> None:
    def passed(equal: int, difference: int) -> list[bool | None]:
        counts = {"equal": equal, "images": 3}
        float32 = {
            "parity_with_diffusers": {"largest_difference": difference, "images": 3},
            "equal_in_other_order": counts,
            "equal_among_other_rows": counts,
        }
        parts = {"parity": {"status": "ok", "sections": {"float32": float32}}}
        return [check.passed for check in evaluate({"parts": parts})]

    assert passed(3, 1) == [True, True, True]
    assert passed(2, 2) == [False, False, False]


def test_profile_counts_time_in_which_no_stream_has_a_kernel() -> None:
    kernels = [Kernel("flash_fwd", 0, 60, 7), Kernel("decoder_conv", 40, 80, 9), Kernel("triton_add", 180, 200, 7)]
    summary = summarize(kernels, ticks=1)
    assert summary["gpu_idle_share"] == 0.5
    assert summary["gaps_over_50us"] == 1
    assert summary["share_by_kind"] == {"attention": 0.5, "convolution": 0.3333, "compiled": 0.1667}
    assert "attention" in longest(kernels)[0]


def test_unknown_part_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown part 'nothing'"):
        select_parts(["nothing"], "cuda")


def test_stand_ins_are_listed_only_on_a_cpu() -> None:
    assert "bench-demo" in [part.name for part in select_parts([], "cpu")]
    assert "bench-demo" not in [part.name for part in select_parts([], "cuda")]


def test_check_survives_parts_that_crash_or_hang_and_skips_those_without_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    outputs = Outputs(tmp_path, out, {"started_at": "", "device": "cpu", "parts": {}})
    parts = [
        Part("no-such-part", "none", 30, devices=("cpu",)),
        Part("parity", "parity", 0.001, devices=("cpu",)),
        Part("command", "command", 100_000, devices=("cpu",)),
        Part("memory", "memory", 30),
    ]
    Orchestrator("cpu", 1000, outputs, make_environment(tmp_path)).run(parts)
    recorded = json.loads((out / "results.json").read_text())["parts"]
    assert [recorded[name].get("status") for name in ("no-such-part", "parity")] == ["failed", "timeout"]
    assert "does not fit" in recorded["command"]["skipped"]
    assert recorded["memory"] == {"skipped": "needs a CUDA device"}
    with gzip.open(out / "log.txt.gz", "rt") as log:
        assert "unknown part 'no-such-part'" in log.read()


def test_version_is_known_without_an_installed_package(tmp_path: Path) -> None:
    folder = write_metadata(tmp_path)
    command = [sys.executable, "-S", "-c", "import importlib.metadata as m; print(m.version('batch-infer'))"]
    done = subprocess.run(command, env={"PYTHONPATH": str(folder)}, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == batch_infer.__version__, done.stderr


@pytest.mark.promises
def test_check_on_a_cpu_passes(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "tools.gpu_check", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    parts = results["parts"]
    ran = {name for name, part in parts.items() if part.get("status") == "ok"}
    assert ran == {"invariance-demo", "parity", "command", "bench-demo", "ceilings"}
    assert {part.get("skipped") for name, part in parts.items() if name not in ran} == {"needs a CUDA device"}

    float32 = parts["parity"]["sections"]["float32"]
    assert float32["parity_with_diffusers"]["largest_difference"] <= 1
    assert float32["equal_in_other_order"] == {"equal": 3, "images": 3}
    for section in ("unet, eager", "decoder, eager"):
        assert parts["invariance-demo"]["sections"][section].items() >= INVARIANT.items()
    resumed = parts["command"]["sections"]["killed and resumed"]
    assert resumed["killed_while_running"] and resumed["images_before_the_kill"] >= 1
    assert resumed["equal"] == resumed["images"] == 40
    assert parts["bench-demo"]["sections"]["bench"]["contenders"]["batch-infer"]["images_per_second"] > 0

    assert (tmp_path / "gpu.md").read_text() == format_report(results)
    assert "| batch invariance, demo | passed |" in (tmp_path / "gpu.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "gpu.md", "log.txt.gz"}


def test_without_a_gpu_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.gpu_check.__main__.has_cuda", lambda: False)
    assert main(["--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device on this machine; --device cpu runs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
