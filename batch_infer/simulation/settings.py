"""Define the settings and the outcome of a simulated job."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from batch_infer.errors import SettingsError

DEFAULT_SCRIPT = Path(__file__).parents[1] / "azureml" / "batch.py"
SETTINGS_NAME = "parallel_run_step.settings.json"
"""Name of the settings file that Azure reads from the folder of the scoring script."""
TO_CSV: Mapping[str, Any] = {"sep": " ", "header": False, "index": False}
"""Arguments of DataFrame.to_csv that Azure uses by default."""


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """A batch deployment's settings, with Azure's defaults, and the faults to simulate. Times are in seconds.

    If `workers` is None, there is one worker per GPU, or one without GPUs. If `gpus` is None, workers use all visible
    GPUs. `kill` is the share of mini-batches whose worker is killed while it runs them, and `duplicate` the share that
    is delivered twice. `seed` seeds the random choice of both and of the order of files. `environment` contains
    additional environment variables of workers.
    """

    inputs: tuple[Path, ...]
    out: Path
    script: Path = DEFAULT_SCRIPT
    model_dir: Path | None = None
    mini_batch_size: int = 10
    workers: int | None = None
    timeout: float = 30.0
    max_retries: int = 3
    error_threshold: int = -1
    gpus: int | None = None
    append_rows: bool = True
    settings_file: Path | None = None
    kill: float = 0.0
    duplicate: float = 0.0
    seed: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise SettingsError if this system cannot start workers, or if the script or model folder does not exist."""
        if os.name != "posix":
            raise SettingsError("azureml-simulate runs only on Linux and macOS: Azure's workers are Linux processes")
        if not self.script.is_file():
            raise SettingsError(f"--script {self.script}: there is no such file; name the scoring script")
        if self.model_dir is not None and not self.model_dir.exists():
            raise SettingsError(f"--model-dir {self.model_dir}: there is no such folder; name the model's folder")

    @property
    def predictions(self) -> Path:
        return self.out / "predictions.csv"

    def to_csv(self) -> dict[str, Any]:
        """Return DataFrame.to_csv's arguments for rows. Raises SettingsError if the settings file is unusable."""
        path = self.settings_file or self.script.with_name(SETTINGS_NAME)
        return {**TO_CSV, **(_read_to_csv(path) if self.settings_file or path.is_file() else {})}


def _read_to_csv(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise SettingsError(f"{path} is not JSON: {error}") from error
    for name in ("append_row", "pandas.DataFrame.to_csv"):
        value = value.get(name, {}) if isinstance(value, dict) else None
    if not isinstance(value, dict):
        raise SettingsError(
            f'{path} must have the form {{"append_row": {{"pandas.DataFrame.to_csv": {{"sep": ",", "index": true}}}}}}'
        )
    return value


@dataclass(slots=True)
class SimulationOutcome:
    """Counts of a job, either final or so far.

    `deliveries` counts how often a worker was given a mini-batch, including retries and duplicates. `timeouts` and
    `kills` count workers that were killed for that reason, and `deaths` counts workers that ended by themselves while
    they had a mini-batch. `kills_missed` counts requested kills that are not assigned to a delivery; at the end,
    these have killed no worker. `rows` includes rows of duplicates. `running_seconds` is the time since the first call
    of run(). `fault` says why the job has failed, or is None.
    """

    mini_batches: int
    files: int
    succeeded: int = 0
    failed: int = 0
    failed_files: int = 0
    deliveries: int = 0
    retries: int = 0
    duplicates: int = 0
    kills: int = 0
    kills_missed: int = 0
    timeouts: int = 0
    deaths: int = 0
    rows: int = 0
    seconds: float = 0.0
    running_seconds: float = 0.0
    predictions: Path | None = None
    logs: Path | None = None
    fault: str | None = None

    @property
    def settled(self) -> int:
        """The number of mini-batches that have succeeded or finally failed."""
        return self.succeeded + self.failed

    @property
    def rows_per_second(self) -> float | None:
        return self.rows / self.running_seconds if self.rows and self.running_seconds else None

    def as_dict(self) -> dict[str, Any]:
        paths = {name: str(path) if (path := getattr(self, name)) else None for name in ("predictions", "logs")}
        return {**asdict(self), **paths, "rows_per_second": self.rows_per_second}
