"""Test the search for the throughput plateau, and that its result is cached."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batch_infer.autotune import cache, calibration, plateau
from batch_infer.autotune.plateau import find_plateau
from batch_infer.diffusion import Context
from batch_infer.errors import RowError
from batch_infer.models import SamplingRules
from batch_infer.records import SamplingParams
from batch_infer.settings import Compute, SafetySettings
from tests.clocks import Clock
from tests.fakes import MemoryLimitedPainter, Painter
from tests.painting import RULES, PaintingPipeline, StoringPipeline, load_painting, paint_row
from tests.runs import command, run, run_json
from tests.stackers import assert_restored
from tests.tables import write_csv

PARAMS = SamplingParams(16, 16, 50, 7.5, 0.0)
COMPUTE = Compute("cpu", "float32", slots=4, decode_batch=2, threads=1)


class FakeDevice(Painter):
    """A UNet call takes a fixed time for up to `wide` batch elements, and proportionally longer for more.

    A decoder call takes a fixed time for up to two images.
    """

    def __init__(self, wide: int, clock: Clock) -> None:
        super().__init__()
        self._wide, self._clock = wide, clock

    def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        self._clock.sleep(0.004 * max(1.0, len(sample) / self._wide))
        return sample

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self._clock.sleep(0.004 * max(1.0, len(latents) / 2))
        return latents


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plateau, "TRIAL_SECONDS", 0.02)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a clock that only the devices of these tests advance."""
    clock = Clock()
    monkeypatch.setattr(plateau, "time", clock)
    return clock


@pytest.mark.parametrize("wide", [4, 16])
def test_the_plateau_is_where_larger_batches_are_no_faster(clock: Clock, wide: int) -> None:
    result = find_plateau(FakeDevice(wide, clock), PARAMS)
    assert (result.slots, result.decode_batch) == (wide, 2)


def test_memory_limits_the_search(clock: Clock) -> None:
    class Roomy(MemoryLimitedPainter):
        def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
            clock.sleep(0.004)  # for every batch size, so that larger batches are faster
            return super().denoise(sample, timestep, context)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            clock.sleep(0.004)
            return super().decode(latents)

    assert find_plateau(Roomy(slots=40, decode=3), PARAMS).slots == 32
    with pytest.raises(torch.OutOfMemoryError):
        find_plateau(MemoryLimitedPainter(slots=1), PARAMS)


def test_memory_limits_the_search_for_any_pipeline() -> None:
    model = load_painting()
    model.pipeline.transformer.memory = 4
    assert find_plateau(model, paint_row().params).slots <= 4
    model.pipeline.transformer.memory = 1
    with pytest.raises(torch.OutOfMemoryError):
        find_plateau(model, paint_row().params)
    assert_restored(model)


def test_rows_that_run_alone_need_no_search() -> None:
    result = find_plateau(load_painting(StoringPipeline), paint_row().params)
    assert (result.slots, result.decode_batch) == (2, 1)


def test_steps_that_any_pipeline_refuses_are_reported() -> None:
    with pytest.raises(RowError, match="PaintingPipeline does not support this row"):
        find_plateau(load_painting(), paint_row(steps=0).params)


class TwoStepPipeline(PaintingPipeline):
    """Accepts only two steps, as SANA-Sprint does."""

    @wraps(PaintingPipeline.__call__)
    def __call__(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        if options["num_inference_steps"] != 2:
            raise ValueError("only 2 steps are supported")
        return super().__call__(*args, **options)


def card_of(rules: SamplingRules) -> Any:
    return SimpleNamespace(
        uses_pipeline_call=True,
        num_inference_steps=rules.num_inference_steps,
        guidance_scale=rules.guidance_scale,
        embedded_guidance=False,
        sizes=rules.sizes,
        quantize=None,
    )


def test_rates_of_a_pipeline_with_one_step_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = replace(RULES, num_inference_steps=2)
    model = load_painting(TwoStepPipeline, rules)
    monkeypatch.setattr(calibration, "_load_model", lambda *_: (model, 0.5))
    rates = calibration.measure_rates(card_of(rules), COMPUTE, SafetySettings(), "png", (32, 32))
    assert rates.start == 0.5
    assert rates.tick > 0


def test_a_size_that_a_pipeline_refuses_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are invalid, whatever the batch sizes are."""

    def refuse(*_: Any) -> None:
        raise RowError("PaintingPipeline does not support this row")

    monkeypatch.setattr(calibration, "_load_model", lambda *_: (load_painting(), 0.5))
    monkeypatch.setattr(plateau, "find_plateau", refuse)
    result = calibration.measure_plateau(card_of(RULES), COMPUTE, SafetySettings(), (32, 32))
    assert (result.slots, result.decode_batch) == (2, 1)


@pytest.mark.promises
@pytest.mark.usefixtures("probe_here")
def test_auto_slots_are_measured_once_for_plan_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = write_csv(
        tmp_path / "t.csv", [["prompt", "width"], *(["a red circle", 64 + 8 * (k > 2)] for k in range(4))]
    )
    options = ("--slots", "auto", "--threads", "1", "--steps", "2", "--safety", "none", "-v")
    planned = command("plan", table, "--json", *options)
    assert planned.code == 0, planned.stderr
    assert planned.stderr.count("looking for the best number of slots") == 2
    first = run(table, tmp_path / "one", *options)
    assert first.code == 0, first.stderr
    assert "looking for the best number of slots" not in first.stderr
    compute = run_json(tmp_path / "one")["compute"]
    assert [(shape["height"], shape["width"]) for shape in compute["by_size"]] == [(64, 64), (64, 72)]
    assert all(shape["slots"] >= 2 and shape["decode_batch"] >= 1 for shape in compute["by_size"])
    summary = run_json(tmp_path / "one")["summary"]
    assert summary["ok"] == 4
    assert f'"row_forwards": {summary["row_forwards"]}, "ticks": {summary["ticks"]}' in planned.stdout
    # A continued run keeps the batch sizes even if the cache is lost, and --slots N overrides them.
    for file in (tmp_path / "cache").rglob("plateau-*.json"):
        file.unlink()
    write_csv(table, [["prompt", "width"], *(["a red circle", 64 + 8 * (k > 2)] for k in range(5))])
    again = run(table, tmp_path / "one", *options)
    assert again.code == 0, again.stderr
    assert "looking for" not in again.stderr
    assert run_json(tmp_path / "one")["compute"] == compute
    write_csv(table, [["prompt", "width"], *(["a red circle", 64 + 8 * (k > 2)] for k in range(6))])
    assert run(table, tmp_path / "one", *options, "--slots", "6").code == 0
    assert (run_json(tmp_path / "one")["compute"]["slots"], run_json(tmp_path / "one")["compute"]["by_size"]) == (6, [])


@pytest.mark.parametrize("slots", ["1", "many", "Auto", "0"])
def test_invalid_slots_are_refused(tmp_path: Path, slots: str) -> None:
    table = write_csv(tmp_path / "t.csv", [["prompt"], ["x"]])
    done = command("plan", table, "--slots", slots)
    assert done.code == 2
    assert "neither a number from 2 to 4096 nor auto" in done.stderr


def test_a_plateau_that_cannot_be_saved_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    result = find_plateau(FakeDevice(4, clock), PARAMS)
    monkeypatch.setattr(cache, "user_cache_path", lambda name: tmp_path / name)
    (tmp_path / "batch-infer").write_text("a file instead of the folder")
    conditions: dict[str, Any] = {"size": (16, 16)}
    cache.save_calibration(conditions, result)
    assert cache.load_calibration(cache.Plateau, conditions) is None
