"""Measurements of this machine: the device, the throughput plateau of a model, and what an image costs.

They are kept in the user's cache. The probe measures in another process, so that the parent imports no torch.
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
    "explain_out_of_memory",
    "detect_device",
    "find_plateau",
    "load_calibration",
    "save_calibration",
]
