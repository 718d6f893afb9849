"""Test that the calibration cache loads values only under their own conditions, and ignores damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest

from batch_infer.autotune import cache
from batch_infer.autotune.cache import Plateau, Rates, load_calibration, save_calibration
from batch_infer.records import utc_now

CONDITIONS = {"machine": "here", "size": (64, 64)}
RATES = Rates(start=3.5, tick=0.25, image=0.01, image_bytes=1234.5, measured_at=utc_now())


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path / "batch-infer"


def test_a_calibration_is_loaded_only_under_its_own_conditions() -> None:
    plateau = Plateau(slots=32, decode_batch=4, measured_at=utc_now())
    assert load_calibration(Rates, CONDITIONS) is None
    save_calibration(CONDITIONS, RATES)
    save_calibration(CONDITIONS, plateau)
    assert load_calibration(Rates, CONDITIONS) == RATES
    assert load_calibration(Plateau, CONDITIONS) == plateau
    assert load_calibration(Rates, {**CONDITIONS, "size": (64, 72)}) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measured": {"tick": 1}}', '{"measured": {"measured_at": 3}}'])
def test_a_damaged_file_is_not_loaded(cache_folder: Path, content: str) -> None:
    save_calibration(CONDITIONS, RATES)
    (file,) = cache_folder.rglob("*.json")
    file.write_text(content)
    assert load_calibration(Rates, CONDITIONS) is None


def test_a_cache_that_cannot_be_written_is_no_error(cache_folder: Path) -> None:
    cache_folder.parent.mkdir(exist_ok=True)
    cache_folder.write_text("a file instead of the folder")
    save_calibration(CONDITIONS, RATES)
    assert load_calibration(Rates, CONDITIONS) is None
