"""The deployment of an Azure ML endpoint, read from environment variables: settings, model and device."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batch_infer.cli import set_up_logging, settings_from_environment
from batch_infer.errors import SettingsError, UsageError
from batch_infer.jobs import find_model, make_paths_absolute, read_run, resolve_run
from batch_infer.serving import Deployment
from batch_infer.settings import ModelSettings, RunSettings, TableSettings

MODEL_DEPTH = 4
"""Levels below AZUREML_MODEL_DIR that are searched: a registered model is some folders down."""
READ_ATTEMPTS, RETRY_SECONDS = 10, 2.0
"""Attempts to read a run.json that cannot be parsed, and the time between them."""
_FOLDER, _FILE = "model_index.json", ".safetensors"
IGNORED = tuple(
    f"BATCH_INFER_{option}"
    for option in (
        *("RESULTS", "MAX_FAILED", "PRICE_PER_HOUR", "TIME_LIMIT", "METRICS_FILE"),
        *("OUT", "JSON", "QUIET", "VERBOSE", "NO_PROGRESS"),
    )
)
"""Variables of `run` for results.* or the terminal, which an endpoint does not have. They are never read."""

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class AzureDeployment(Deployment):
    """A deployment that writes to OUT. `record` is its run.json, `earlier` the run.json that OUT already has."""

    record: Mapping[str, Any]
    earlier: Mapping[str, Any] | None


def find_deployment(out: str, *, alone: bool = False) -> AzureDeployment:
    """Return the deployment that the environment describes. OUT need not exist. Raises UsageError.

    `alone`: this process is the only worker of its machine.
    """
    requested = settings_from_environment("-", out, IGNORED)
    set_up_logging()  # after the settings, which have its format
    if ignored := [name for name in IGNORED if os.environ.get(name)]:
        log.warning("%s: ignored in an endpoint", ", ".join(ignored))
    settings = _adapt_settings(requested, alone=alone)
    if not alone:
        _refuse_worker_without_gpu(settings)
    if settings.model.name is None:
        log.warning("neither BATCH_INFER_MODEL nor AZUREML_MODEL_DIR names a model: using the built-in demo model")
    card = find_model(settings)
    earlier = read_cached_run(settings.out)
    from batch_infer.autotune import detect_device  # imports torch, which takes seconds

    settings, compute, record, rules = resolve_run(settings, card, detect_device(settings.model.device), earlier)
    return AzureDeployment(settings, card, compute, rules, record, earlier)


def read_cached_run(out: Path) -> dict[str, Any] | None:
    """Return run.json, which another worker may just have written, or None where OUT has none. Raises UsageError.

    A mount of a storage account that caches file sizes, such as blobfuse, may show a new file truncated to the size of
    the old one for a while.
    """
    for _ in range(READ_ATTEMPTS - 1):
        with suppress(UsageError):
            return read_run(out)
        time.sleep(RETRY_SECONDS)
    return read_run(out)


def _adapt_settings(settings: RunSettings, *, alone: bool) -> RunSettings:
    """Return settings of a run as those of an endpoint. Raises SettingsError where they cannot be."""
    unsupported = {
        "BATCH_INFER_OVERWRITE": settings.overwrite,
        "BATCH_INFER_LIMIT": settings.table.limit,
        "BATCH_INFER_ID_FROM": settings.table.id_from != "row",
    }
    for name in (name for name, value in unsupported.items() if value):
        raise SettingsError(f"{name} is set, but an endpoint's workers get tables one by one; unset it")
    if settings.compute.slots == "auto":
        raise SettingsError("BATCH_INFER_SLOTS=auto: use a number here; `batch-infer bench --slots auto` finds one")
    table = TableSettings((), settings.table.columns)
    workers = 1 if alone else settings.compute.processes or _count_gpus() or 1
    safety = settings.safety.split_among(workers)
    return make_paths_absolute(replace(settings, table=table, model=_choose_model(settings.model), safety=safety))


def _choose_model(settings: ModelSettings) -> ModelSettings:
    """Return BATCH_INFER_MODEL, else the model registered with the deployment, else the built-in model."""
    folder = os.environ.get("AZUREML_MODEL_DIR", "")
    return settings if settings.name or not folder else replace(settings, name=find_model_path(Path(folder)))


def find_model_path(folder: Path) -> str:
    """Return the only diffusers folder, or else the only .safetensors file, at or below a folder.

    The uppermost level with a model counts. Files, which may be LoRAs, count only if there is no diffusers folder on
    any level. Raises SettingsError.
    """
    variable = f"AZUREML_MODEL_DIR={folder}"
    if not folder.is_dir():
        raise SettingsError(f"{variable} is not a folder: register a model, or set BATCH_INFER_MODEL")
    for models in (*_list_models(folder, folders=True), *_list_models(folder, folders=False)):
        if len(models) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in models)
            raise SettingsError(f"{variable} holds several models ({names}): choose one with BATCH_INFER_MODEL")
        if models:
            return str(models[0])
    raise SettingsError(f"{variable} holds no model: register a diffusers folder (with {_FOLDER}) or a {_FILE} file")


def _list_models(folder: Path, *, folders: bool) -> Iterator[list[Path]]:
    """Yield the diffusers folders, or the .safetensors files, of each level from the top."""
    level = [folder]
    for _ in range(MODEL_DEPTH + 1):
        inner = [path for parent in level for path in sorted(parent.iterdir())]
        yield [path for path in (level if folders else inner) if _is_model(path, folders=folders)]
        level = [path for path in inner if path.is_dir()]


def _is_model(path: Path, *, folders: bool) -> bool:
    return (path / _FOLDER).is_file() if folders else path.suffix == _FILE


def _refuse_worker_without_gpu(settings: RunSettings) -> None:
    """Raise SettingsError in a worker that would share the first worker's GPU and its memory.

    Azure sets CUDA_VISIBLE_DEVICES to one GPU per worker, and does not set it for workers beyond the number of GPUs.
    """
    if _count_gpus() and "CUDA_VISIBLE_DEVICES" not in os.environ and settings.model.device != "cpu":
        raise SettingsError(
            "this worker has no GPU of its own: set max_concurrency_per_instance to the GPUs of an instance"
            f" ({_count_gpus()})"
        )


def _count_gpus() -> int:
    """Return the number of GPUs of this instance, as counted by Azure: a batch job has one worker per GPU."""
    count = os.environ.get("AZ_BATCHAI_GPU_COUNT_FOUND", "")
    return int(count) if count.isdecimal() else 0
