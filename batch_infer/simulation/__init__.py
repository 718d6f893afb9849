"""Azure ML's batch endpoint on this machine: it runs a scoring script as Azure's does, faults included.

    simulate(SimulationSettings(inputs=(Path("tables"),), out=Path("out"), workers=3, kill=0.2, duplicate=0.1))

Nothing here imports torch or pandas: what a worker has loaded is what its script has loaded.
"""

from typing import TYPE_CHECKING

from batch_infer.lazy import import_on_use
from batch_infer.simulation.outcome import Outcome
from batch_infer.simulation.settings import DEFAULT_SCRIPT, SimulationSettings

if TYPE_CHECKING:
    from batch_infer.simulation.job import simulate
else:
    __getattr__ = import_on_use(
        __name__,
        job=("simulate",),
    )

__all__ = ["DEFAULT_SCRIPT", "Outcome", "SimulationSettings", "simulate"]
