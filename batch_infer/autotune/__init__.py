"""Autotune."""

from typing import TYPE_CHECKING

from batch_infer.autotune.calibration import Plateau, Rates, load_calibration, save_calibration
from batch_infer.autotune.probe import Probe
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.autotune.devices import explain_out_of_memory, find_device
    from batch_infer.autotune.plateau import find_plateau
else:
    __getattr__ = import_on_use(
        __name__,
        devices=(
            "find_device",
            "explain_out_of_memory",
        ),
        plateau=("find_plateau",),
    )

__all__ = [
    "Plateau",
    "Probe",
    "Rates",
    "find_device",
    "find_plateau",
    "explain_out_of_memory",
    "load_calibration",
    "save_calibration",
]
