"""Simulate an Azure ML batch endpoint on this machine: run a scoring script as Azure does, and cause faults.

    simulate(SimulationSettings(inputs=(Path("tables"),), out=Path("out"), workers=3, kill=0.2, duplicate=0.1))

This package does not import torch or pandas, so a worker loads them only if its script does.
"""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.simulation.settings import DEFAULT_SCRIPT, SimulationOutcome, SimulationSettings

if TYPE_CHECKING:
    from batch_infer.simulation.job import simulate
else:
    __getattr__ = import_on_use(__name__, job=("simulate",))

__all__ = ["DEFAULT_SCRIPT", "SimulationOutcome", "SimulationSettings", "simulate"]
