"""Azure ML's batch endpoint on this machine: it runs a scoring script as Azure's does, faults included.

    simulate(SimulationSettings(inputs=(Path("tables"),), out=Path("out"), workers=3, kill=0.2, duplicate=0.1))

Nothing here imports torch or pandas: what a worker has loaded is what its script has loaded.
"""

from __future__ import annotations

from collections.abc import Callable

from batch_infer.simulation.outcome import Outcome
from batch_infer.simulation.settings import DEFAULT_SCRIPT, SimulationSettings

__all__ = ["DEFAULT_SCRIPT", "Outcome", "SimulationSettings", "simulate"]


def simulate(settings: SimulationSettings, told: Callable[[Outcome], None] = lambda outcome: None) -> Outcome:
    """Run a scoring script over files as a batch endpoint does. `told` hears what has come of it until now.

    That the job has failed is said by the outcome. Raises SettingsError, TableError, StorageError.
    """
    from batch_infer.simulation.job import run_job  # the driver's, of which its workers need nothing

    return run_job(settings, told)
