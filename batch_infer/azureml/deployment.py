"""Read the deployment of an Azure ML endpoint from environment variables: its settings, model and device."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from batch_infer.autotune import detect_device
from batch_infer.cli import set_up_logging, settings_from_environment
from batch_infer.errors import SettingsError, UsageError
from batch_infer.jobs import find_model, make_paths_absolute, read_run, resolve_run
from batch_infer.serving import Deployment
from batch_infer.settings import RunSettings, TableSettings
from batch_infer.store import LocalStore, is_url

MODEL_DEPTH = 4
"""Folder levels below AZUREML_MODEL_DIR to search for a model. A registered model may be several levels down."""
READ_ATTEMPTS, RETRY_SECONDS = 10, 2.0
"""Maximum number of attempts to read an invalid run.json, and the seconds between attempts."""
_FILE_OPTIONS = ("RESULTS", "MAX_FAILED", "PRICE_PER_HOUR", "TIME_LIMIT", "METRICS_FILE", "OUT")
_TERMINAL_OPTIONS = ("JSON", "QUIET", "VERBOSE", "NO_PROGRESS")
IGNORED = tuple(f"BATCH_INFER_{option}" for option in (*_FILE_OPTIONS, *_TERMINAL_OPTIONS))
"""Variables for options of `run` that an endpoint ignores, because they concern a whole run or a terminal."""

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class AzureDeployment(Deployment):
    """A deployment in Azure ML. `record` is its content for run.json, and `earlier` that of OUT's run.json, or None."""

    record: Mapping[str, Any]
    earlier: Mapping[str, Any] | None


def read_deployment(out: str | None = None, *, is_only_worker: bool = False) -> AzureDeployment:
    """Return the deployment that the environment describes. Raises UsageError, StorageError.

    `out` is a folder that need not exist, or None for a deployment without a manifest. `is_only_worker`: no other
    worker runs on this machine.
    """
    unused = Path(tempfile.gettempdir(), f"batch-infer-{uuid4().hex}")
    requested = settings_from_environment("-", out or str(unused), IGNORED)
    set_up_logging()  # after the settings, which define the log format
    if ignored := [name for name in IGNORED if os.environ.get(name)]:
        log.warning("%s: ignored in an endpoint", ", ".join(ignored))
    settings = _adapt_settings(requested, is_only_worker=is_only_worker)
    if not is_only_worker:
        _refuse_worker_without_gpu(settings)
    if settings.model.name is None:
        log.warning("neither BATCH_INFER_MODEL nor AZUREML_MODEL_DIR names a model: using the built-in demo model")
    card = find_model(settings)
    earlier = read_cached_run(LocalStore(Path(settings.out)))
    settings, compute, record, rules = resolve_run(settings, card, detect_device(settings.model.device), earlier)
    return AzureDeployment(settings, card, compute, rules, record, earlier)


def read_cached_run(store: LocalStore) -> dict[str, Any] | None:
    """Return the content of run.json, or None if OUT has none. Raises UsageError, StorageError.

    An invalid file is read again, because another worker may just have written it: a mount of a storage account
    that caches file sizes, such as blobfuse, may temporarily truncate a new file to the size of the old file.
    """
    for _ in range(READ_ATTEMPTS - 1):
        with suppress(UsageError):
            return read_run(store)
        time.sleep(RETRY_SECONDS)
    return read_run(store)


def _adapt_settings(settings: RunSettings, *, is_only_worker: bool) -> RunSettings:
    """Convert the settings of a run for an endpoint.

    The model is BATCH_INFER_MODEL, else the model registered with the deployment, else the built-in model. Raises
    SettingsError if an endpoint does not support the settings, or if the registered model is missing or ambiguous.
    """
    unsupported = {
        "BATCH_INFER_OVERWRITE": settings.overwrite,
        "BATCH_INFER_LIMIT": settings.table.limit,
        "BATCH_INFER_ID_FROM": settings.table.id_from != "row",
        "BATCH_INFER_SINK": settings.output.sink != "folder",
    }
    if names := [name for name, value in unsupported.items() if value]:
        raise SettingsError(
            f"{names[0]} is set, but an endpoint does not support it: no worker sees all rows; unset it"
        )
    if is_url(settings.out):
        raise SettingsError(f"{settings.out}: an endpoint writes to a folder, on which Azure mounts its storage")
    if settings.compute.slots == "auto":
        raise SettingsError("BATCH_INFER_SLOTS=auto: use a number here; `batch-infer bench --slots auto` finds one")
    model, folder = settings.model, os.environ.get("AZUREML_MODEL_DIR")
    if folder and not model.name:
        model = replace(model, name=find_model_path(Path(folder)))
    table = TableSettings((), settings.table.columns)
    workers = 1 if is_only_worker else settings.compute.processes or _count_gpus() or 1
    safety = settings.safety.split_among(workers)
    return make_paths_absolute(replace(settings, table=table, model=model, safety=safety))


def find_model_path(folder: Path) -> str:
    """Return the path of the only diffusers folder, or else of the only .safetensors file, in or below a folder.

    If several levels contain models, only the highest such level counts. Files, which may be LoRAs, count only if there
    is no diffusers folder on any level down to MODEL_DEPTH. Raises SettingsError if there is no model, or several.
    """
    variable = f"AZUREML_MODEL_DIR={folder}"
    if not folder.is_dir():
        raise SettingsError(f"{variable} is not a folder: register a model, or set BATCH_INFER_MODEL")
    for name in ("model_index.json", "*.safetensors"):
        for depth in range(MODEL_DEPTH + 1):
            paths = sorted(folder.glob("*/" * depth + name))
            models = [path.parent if path.name == name else path for path in paths]
            if len(models) > 1:
                names = ", ".join(str(path.relative_to(folder)) for path in models)
                raise SettingsError(f"{variable} contains several models ({names}): choose one with BATCH_INFER_MODEL")
            if models:
                return str(models[0])
    raise SettingsError(
        f"{variable} contains no model: register a diffusers folder (with model_index.json) or a .safetensors file"
    )


def _refuse_worker_without_gpu(settings: RunSettings) -> None:
    """Raise SettingsError in a worker that would share the first worker's GPU and its memory.

    Azure sets CUDA_VISIBLE_DEVICES to one GPU per worker, but does not set it for workers beyond the number of GPUs.
    """
    if _count_gpus() and "CUDA_VISIBLE_DEVICES" not in os.environ and settings.model.device != "cpu":
        raise SettingsError(
            "this worker has no GPU: set max_concurrency_per_instance to the number of GPUs per instance"
            f" ({_count_gpus()})"
        )


def _count_gpus() -> int:
    """Return the number of GPUs on this machine according to Azure, or 0 if Azure does not set it."""
    count = os.environ.get("AZ_BATCHAI_GPU_COUNT_FOUND", "")
    return int(count) if count.isdecimal() else 0
