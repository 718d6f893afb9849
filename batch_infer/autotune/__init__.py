"""Detect the device, and measure the throughput plateau and the cost of an image.

Commands can save the results for later commands. The probe measures in a separate process, so that the parent does not
need torch.
"""

from typing import TYPE_CHECKING

from batch_infer.autotune.cache import Plateau, Rates, load_calibration, save_calibration
from batch_infer.autotune.devices import detect_device, explain_out_of_memory
from batch_infer.autotune.probe import Probe
from batch_infer.lazy import import_on_use

if TYPE_CHECKING:
    from batch_infer.autotune.plateau import find_plateau
else:
    __getattr__ = import_on_use(__name__, plateau=("find_plateau",))

__all__ = [
    "Plateau",
    "Probe",
    "Rates",
    "detect_device",
    "explain_out_of_memory",
    "find_plateau",
    "load_calibration",
    "save_calibration",
]
