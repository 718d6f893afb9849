"""Out of memory during a run: the slots are halved, no row is lost, and the run keeps the smaller number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from batch_infer.models.stable_diffusion import StableDiffusion
from batch_infer.worker import worker as worker_module
from tests.runs import assert_whole, hashes, results, run, run_json
from tests.tables import write_csv

HALVED = "out of memory at 64x64 pixels: continuing with 4 slots instead of 8"


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make denoiser calls with more than 4 rows run out of memory."""
    denoise = StableDiffusion.denoise

    def refuse(self: Any, sample: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(sample) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return denoise(self, sample, *rest)

    monkeypatch.setattr(StableDiffusion, "denoise", refuse)


def table_of(path: Path, rows: int) -> Path:
    return write_csv(path, [["prompt", "guidance_scale"], *([f"{k} red circles", 1 + k % 3] for k in range(rows))])


@pytest.mark.usefixtures("small_device")
def test_a_run_continues_with_half_its_slots(tmp_path: Path) -> None:
    table, out = table_of(tmp_path / "t.csv", 11), tmp_path / "out"
    done = run(table, out)
    assert done.code == 0, done.stderr
    assert HALVED in done.stderr
    assert_whole(out)
    assert {row["status"] for row in results(out)} <= {"ok", "flagged"}
    assert {row["slots"] for row in results(out)} == {4}
    compute = run_json(out)["compute"]
    assert compute["slots"] == 8
    assert compute["by_size"] == [{"height": 64, "width": 64, "slots": 4, "decode_batch": 4}]
    before = hashes(out)
    # Appended rows do not run out of memory again, and nothing is rendered twice.
    again = run(table_of(table, 14), out)
    assert again.code == 0, again.stderr
    assert "out of memory" not in again.stderr
    assert run_json(out)["summary"]["rendered"] == 3
    assert hashes(out).items() >= before.items()
    assert {row["slots"] for row in results(out)} == {4}
    # The bytes are those of a run with 4 slots from the start.
    assert run(table, tmp_path / "four", "--slots", "4").code == 0
    assert hashes(tmp_path / "four") == hashes(out)


def test_mfu_is_reported_if_the_peak_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(tmp_path / "t.csv", 4)
    assert run(table, tmp_path / "unknown").code == 0
    assert run_json(tmp_path / "unknown")["summary"]["mfu"] is None
    monkeypatch.setattr(worker_module, "peak_tflops", lambda name, dtype: 1.0)
    assert run(table, tmp_path / "known").code == 0
    summary = run_json(tmp_path / "known")["summary"]
    assert 0 < summary["mfu"] < 1
    assert 0 < summary["unet_busy"] <= 1
