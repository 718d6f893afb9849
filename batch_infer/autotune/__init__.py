"""Autotune."""

from typing import TYPE_CHECKING

from batch_infer.autotune.calibration import Plateau, Rates, recall_calibration, remember_calibration
from batch_infer.autotune.probe import Probe
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.autotune.devices import find_device, memory_fault
    from batch_infer.autotune.plateau import find_plateau
else:
    __getattr__ = import_on_use(
        __name__,
        devices=(
            "find_device",
            "memory_fault",
        ),
        plateau=("find_plateau",),
    )

__all__ = [
    "Plateau",
    "Probe",
    "Rates",
    "find_device",
    "find_plateau",
    "memory_fault",
    "recall_calibration",
    "remember_calibration",
]
