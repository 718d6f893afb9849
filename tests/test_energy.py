"""Measuring the energy of GPUs: what is known, and what counts once."""

from __future__ import annotations

import sys

import pytest

from batch_infer.energy import EnergyMeter, EnergyReading, sum_energy
from tests.fake_nvml import Driver, install, use_gpu


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver(a=5_000, b=70_000)
    install(monkeypatch, driver)
    use_gpu(monkeypatch, "a")
    return driver


def test_a_meter_reads_the_counter_of_the_gpu_that_torch_uses(driver: Driver) -> None:
    meter = EnergyMeter("cuda")
    driver.counters |= {"GPU-a": 9_000, "GPU-b": 99_000}
    assert meter.read() == EnergyReading("GPU-a", 5_000, 9_000)
    driver.counters["GPU-a"] = 11_000
    assert meter.read() == EnergyReading("GPU-a", 5_000, 11_000)


def test_a_cpu_has_no_counter(driver: Driver) -> None:
    assert EnergyMeter("cpu").read() is None


def test_energy_is_unknown_for_a_gpu_without_a_counter(driver: Driver) -> None:
    driver.counters["GPU-a"] = None
    assert EnergyMeter("cuda").read() is None


def test_energy_is_unknown_if_the_counter_cannot_be_read_any_more(driver: Driver) -> None:
    meter = EnergyMeter("cuda")
    driver.counters["GPU-a"] = None
    assert meter.read() is None


def test_energy_is_unknown_for_a_part_of_a_gpu(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.divided = {"GPU-b"}
    assert EnergyMeter("cuda").read() is not None
    driver.divided = {"GPU-a"}
    assert EnergyMeter("cuda").read() is None
    use_gpu(monkeypatch, "the UUID of a MIG instance")
    assert EnergyMeter("cuda").read() is None


def test_energy_is_unknown_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    use_gpu(monkeypatch, "a")
    assert EnergyMeter("cuda").read() is None


def test_energy_is_unknown_without_nvidias_driver(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither an error nor a line of output."""
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        pass
    else:
        pytest.skip("this machine has NVIDIA's driver")
    monkeypatch.delitem(sys.modules, "pynvml")
    use_gpu(monkeypatch, "a")
    assert EnergyMeter("cuda").read() is None
    assert capfd.readouterr() == ("", "")


def reading(device: str, start_wh: float, end_wh: float) -> EnergyReading:
    return EnergyReading(device, round(start_wh * 3.6e6), round(end_wh * 3.6e6))


@pytest.mark.parametrize(
    ("readings", "wh"),
    [
        ([reading("a", 100, 103)], 3),
        ([reading("a", 0, 3), reading("b", 1, 3)], 5),
        ([reading("a", 100, 103), reading("a", 101, 105)], 5),  # two workers on one GPU
        ([reading("a", 101, 102), reading("a", 100, 105)], 5),
        ([reading("a", 100, 103), reading("a", 104, 105)], 4),  # one after another
        ([reading("a", 900, 903), reading("a", 1, 3)], 5),  # the driver was loaded again
    ],
)
def test_the_energy_of_a_device_counts_once(readings: list[EnergyReading], wh: float) -> None:
    assert sum_energy(readings) == pytest.approx(wh)


def test_energy_is_unknown_if_that_of_one_worker_is() -> None:
    assert sum_energy([reading("a", 100, 103), None]) is None


def test_a_counter_that_did_not_move_is_unknown_and_not_zero() -> None:
    assert sum_energy([reading("a", 100, 100)]) is None
    assert sum_energy([]) is None
