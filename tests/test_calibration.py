"""What rendering takes here: kept between commands, and measured again where it cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from batch_infer.autotune import calibration
from batch_infer.autotune.calibration import Plateau, Rates
from batch_infer.records import utc_now

CONDITIONS = {"machine": "here", "size": (64, 64)}
RATES = Rates(start=3.5, tick=0.25, image=0.01, image_bytes=1234.5, measured_at=utc_now())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(calibration, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path / "batch-infer"


def test_rates_are_recalled_under_the_conditions_that_they_were_measured_under() -> None:
    knee = Plateau(slots=32, decode_batch=4, measured_at=utc_now())
    assert calibration.load_calibration(Rates, CONDITIONS) is None
    calibration.save_calibration(CONDITIONS, RATES)
    calibration.save_calibration(CONDITIONS, knee)
    assert calibration.load_calibration(Rates, CONDITIONS) == RATES
    assert calibration.load_calibration(Plateau, CONDITIONS) == knee
    assert calibration.load_calibration(Rates, {**CONDITIONS, "size": (64, 72)}) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measured": {"tick": 1}}', '{"measured": {"measured_at": 3}}'])
def test_what_cannot_be_read_is_not_recalled(cache: Path, content: str) -> None:
    calibration.save_calibration(CONDITIONS, RATES)
    (file,) = cache.rglob("*.json")
    file.write_text(content)
    assert calibration.load_calibration(Rates, CONDITIONS) is None


def test_a_cache_that_cannot_be_written_is_no_fault(cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")
    calibration.save_calibration(CONDITIONS, RATES)
    assert calibration.load_calibration(Rates, CONDITIONS) is None
