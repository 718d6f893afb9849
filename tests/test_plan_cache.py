"""Test that a plan starts a process with torch only for facts that no earlier plan has cached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batch_infer.autotune import devices, probe
from batch_infer.autotune.probe import Probe
from batch_infer.settings import Device
from tests.runs import QUICK, command
from tests.tables import write_csv

GPU = Device("cuda", "NVIDIA Test", 2)
INFORMATION = "Model: \t\t NVIDIA Test\nIRQ: 35\n"
ROWS: list[list[Any]] = [["prompt", "num_inference_steps"], ["a red circle", 2], ["a green star", 3]]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a cache that a first plan of ROWS has filled, and the output of that plan."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(Probe, "_call", lambda _, function, *arguments: function(*arguments))
        return folder / "cache", plan(write_csv(folder / "t.csv", ROWS))


@pytest.fixture
def cache(tmp_path: Path, calibrated: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the test use a copy of the cache of the first plan."""
    shutil.copytree(calibrated[0], tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", ROWS)


@pytest.fixture
def probe_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the functions that the probe calls. They run in this process."""
    names: list[str] = []

    def call(_: Probe, function: Callable[..., Any], *arguments: Any) -> Any:
        names.append(function.__name__)
        return function(*arguments)

    monkeypatch.setattr(Probe, "_call", call)
    return names


def plan(table: Path, *options: str) -> dict[str, Any]:
    line: list[str | Path] = [
        "plan",
        table,
        "--out",
        table.parent / "out",
        *QUICK,
        "--device",
        "auto",
        "--json",
        *options,
    ]
    done = command(*line)
    assert done.code in (0, 3), done.stderr
    return dict(json.loads(done.stdout))


def test_a_calibrated_plan_starts_no_process_and_prints_the_same(
    table: Path, cache: Path, calibrated: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a calibrated plan started a process")

    monkeypatch.setattr(probe, "ProcessPoolExecutor", refuse)
    first, second = dict(calibrated[1]), plan(table)
    for printed in (first, second):
        assert printed.pop("seconds") > 0  # includes the time for reading the table
        assert list(printed.pop("files").values()) == [2]
    assert second == first


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_first_plan_probes_each_fact_once(
    table: Path, tmp_path: Path, device: str, probe_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    plan(table, "--device", device)
    detected = ["detect_device"] if device == "auto" else []
    assert probe_calls == [*detected, "count_evaluations", "count_evaluations", "import_renderer", "measure_rates"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--scheduler", "HeunDiscreteScheduler"), ["count_evaluations", "count_evaluations"]),
        (("--guidance-scale", "1"), []),
    ],
)
def test_a_changed_scheduler_is_probed_again(
    table: Path, cache: Path, probe_calls: list[str], options: tuple[str, ...], expected: list[str]
) -> None:
    plan(table, *options)
    assert probe_calls == expected
    probe_calls.clear()
    plan(table, *options)
    assert probe_calls == []


def test_only_new_step_counts_are_probed(table: Path, cache: Path, probe_calls: list[str]) -> None:
    write_csv(table, [*ROWS, ["a blue square", 7], ["a blue square", 7]])
    plan(table)
    assert probe_calls == ["count_evaluations"]
    probe_calls.clear()
    plan(write_csv(table, ROWS))
    plan(write_csv(table, [*ROWS, ["a blue square", 7]]))
    assert probe_calls == []


def test_other_visible_gpus_are_probed_again(
    table: Path, cache: Path, probe_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    plan(table)
    assert probe_calls == ["detect_device"]
    probe_calls.clear()
    plan(table)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    plan(table)
    assert probe_calls == []


def test_a_refused_step_count_is_cached_with_its_reason(table: Path, cache: Path, probe_calls: list[str]) -> None:
    options = ("--scheduler", "PNDMScheduler:skip_prk_steps=false")
    write_csv(table, [ROWS[0], ["x", 4], ["x", 3]])
    first = plan(table, *options)
    assert probe_calls == ["count_evaluations", "count_evaluations"]
    probe_calls.clear()
    second = plan(table, *options)
    assert probe_calls == []
    assert [fault["error"] for fault in first["invalid_results"]]
    assert second["invalid_results"] == first["invalid_results"]


def test_damaged_cache_files_are_probed_again(table: Path, cache: Path, probe_calls: list[str]) -> None:
    for file in cache.rglob("*.json"):
        if not file.name.startswith("rates"):
            file.write_text('{"measured": {"x": []}}')
    plan(table)
    assert probe_calls == ["detect_device", "count_evaluations", "count_evaluations"]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create files of an NVIDIA driver with two GPUs, and return their folder."""
    folder = tmp_path / "nvidia"
    for number in (1, 2):
        (folder / "gpus" / f"0000:0{number}:00.0").mkdir(parents=True)
        (folder / "gpus" / f"0000:0{number}:00.0" / "information").write_text(INFORMATION)
    (folder / "version").write_text("NVRM version: 550.1\n")
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_a_gpu_is_cached(driver: Path) -> None:
    devices.save_device("auto", GPU)
    assert devices.load_device("auto") == GPU
    assert devices.load_device("cuda") is None


def test_a_cpu_is_not_cached_if_gpus_are_visible(driver: Path) -> None:
    """A later command may use them: the driver may have failed temporarily, or another torch may be installed."""
    devices.save_device("auto", Device("cpu", "Test"))
    assert devices.load_device("auto") is None


@pytest.mark.parametrize("change", ["driver", "model", "removed", "added", "order"])
def test_a_changed_gpu_is_probed_again(driver: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices.save_device("auto", GPU)
    first = driver / "gpus" / "0000:01:00.0"
    match change:
        case "driver":
            (driver / "version").write_text("NVRM version: 560.1\n")
        case "model":
            (first / "information").write_text(INFORMATION.replace("Test", "Other"))
        case "removed":
            shutil.rmtree(first)
        case "added":
            shutil.copytree(first, driver / "gpus" / "0000:03:00.0")
        case "order":
            monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert devices.load_device("auto") is None
