"""What a simulation is told: a batch deployment's settings, and the faults that are to befall it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch_infer.errors import SettingsError

DEFAULT_SCRIPT = Path(__file__).parents[2] / "azureml" / "batch.py"
SETTINGS_NAME = "parallel_run_step.settings.json"
"""Azure reads a file of this name where it lies beside the scoring script."""
TO_CSV: Mapping[str, Any] = {"sep": " ", "header": False, "index": False}
"""How Azure writes rows that nobody has said anything about."""


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """The deployment's defaults are Azure's. Times are in seconds.

    `workers` None: one for each GPU, or one. `gpus` None: those of this machine. `kill` is the share of mini-batches
    whose worker is killed while it runs them, `duplicate` the share that is delivered a second time; `seed` decides
    which, and in what order files come. `environment` is what workers find beside this process's own variables.
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
        """See that workers can be started, and that the script and the model are there. Raises SettingsError."""
        if os.name != "posix":
            raise SettingsError("azureml-simulate runs on Linux and macOS alone: Azure's workers are Linux processes")
        if not self.script.is_file():
            raise SettingsError(f"--script {self.script}: there is no such file; name the scoring script")
        if self.model_dir is not None and not self.model_dir.exists():
            raise SettingsError(f"--model-dir {self.model_dir}: there is no such folder; name the model's")

    def to_csv(self) -> dict[str, Any]:
        """With which arguments DataFrame.to_csv writes rows. Raises SettingsError."""
        beside = self.script.with_name(SETTINGS_NAME)
        path = self.settings_file or (beside if beside.is_file() else None)
        return {**TO_CSV, **(_read_to_csv(path) if path else {})}


def _read_to_csv(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise SettingsError(f"{path} is not JSON: {error}") from error
    for name in ("append_row", "pandas.DataFrame.to_csv"):
        found = found.get(name, {}) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise SettingsError(
            f'{path}: say {{"append_row": {{"pandas.DataFrame.to_csv": {{"sep": ",", "index": true}}}}}}'
        )
    return found
