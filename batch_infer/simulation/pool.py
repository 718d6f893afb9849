"""The workers of a job: each has a number, and who replaces one takes its number and its GPU."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from batch_infer.simulation.gpus import gpu_names
from batch_infer.simulation.messages import Duty
from batch_infer.simulation.process import Place, WorkerProcess
from batch_infer.simulation.settings import SimulationSettings
from batch_infer.store import list_names, write_errors


class WorkerPool:
    """Holds the processes that live. `folder` holds their working folders."""

    def __init__(self, settings: SimulationSettings, folder: Path) -> None:
        """Raises SettingsError, StorageError."""
        self._settings, self._folder = settings, folder
        self._duty = Duty(os.path.abspath(settings.script), settings.to_csv() if settings.append_rows else None)  # noqa: PTH100
        self._gpus = gpu_names(settings.gpus)
        self._size = settings.workers or max(1, len(self._gpus))
        self._lives = count()
        self.logs = settings.out / "logs" / "azureml"
        self.workers: dict[int, WorkerProcess] = {}
        self._clear_logs()

    def _clear_logs(self) -> None:
        with write_errors(self.logs):
            self.logs.mkdir(parents=True, exist_ok=True)
            for name in fnmatch.filter(list_names(self.logs), "worker-*.log"):
                (self.logs / name).unlink()

    def fill(self) -> None:
        """Start whoever is missing."""
        for index in range(self._size):
            if index not in self.workers:
                folder = self._folder / f"{next(self._lives)}"
                environment = environment_of(self._settings, self._gpus, index)
                place = Place(index, folder, self.logs / f"worker-{index}.log", environment)
                with write_errors(folder):
                    self.workers[index] = WorkerProcess(place, self._duty)

    def bury(self, worker: WorkerProcess) -> None:
        del self.workers[worker.place.index]
        worker.bury()


def environment_of(settings: SimulationSettings, gpus: Sequence[str], index: int) -> dict[str, str]:
    """What a worker's process finds. One beyond the GPUs is told of none, and may use all, as in Azure."""
    found = {**os.environ, **settings.environment}
    found["AZUREML_BI_OUTPUT_PATH"] = os.path.abspath(settings.out)  # noqa: PTH100
    found["AZ_BATCHAI_GPU_COUNT_FOUND"] = str(len(gpus))
    if settings.model_dir is not None:
        found["AZUREML_MODEL_DIR"] = os.path.abspath(settings.model_dir)  # noqa: PTH100
    found.pop("CUDA_VISIBLE_DEVICES", None)
    if index < len(gpus):
        found["CUDA_VISIBLE_DEVICES"] = gpus[index]
    return found
