"""What a door of Azure ML is deployed with: the settings, model and device that its environment says."""

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
"""How deep below AZUREML_MODEL_DIR a model is looked for: a registered one lies some folders down."""
LOOKS, LOOK_SECONDS = 10, 2.0
"""How often a run.json that cannot be read is looked at, and how long after each look."""
_FOLDER, _FILE = "model_index.json", ".safetensors"
IGNORED = tuple(
    f"BATCH_INFER_{option}"
    for option in (
        *("RESULTS", "MAX_FAILED", "PRICE_PER_HOUR", "TIME_LIMIT", "METRICS_FILE"),
        *("OUT", "JSON", "QUIET", "VERBOSE", "NO_PROGRESS"),
    )
)
"""Variables of `run` for its results as a whole or for its terminal. An endpoint has neither, and never reads them."""

log = logging.getLogger("batch_infer")


@dataclass(frozen=True, slots=True)
class AzureDeployment(Deployment):
    """A deployment on an OUT: `record` is its run.json, `earlier` the run.json that OUT already has."""

    record: Mapping[str, Any]
    earlier: Mapping[str, Any] | None


def find_deployment(out: str, *, alone: bool = False) -> AzureDeployment:
    """What this process's environment asks for, on an OUT that need not be there. Raises UsageError.

    `alone`: it is no worker among others of its machine.
    """
    asked = settings_from_environment("-", out, IGNORED)
    set_up_logging()  # after it, which says in which format
    if ignored := [name for name in IGNORED if os.environ.get(name)]:
        log.warning("%s: ignored in an endpoint", ", ".join(ignored))
    settings = _settings(asked, alone=alone)
    if not alone:
        _refuse_worker_without_gpu(settings)
    if settings.model.name is None:
        log.warning("neither BATCH_INFER_MODEL nor AZUREML_MODEL_DIR names a model: using the built-in demo model")
    card = find_model(settings)
    earlier = read_cached_run(settings.out)
    from batch_infer.autotune import find_device  # imports torch, which takes seconds

    settings, compute, record, rules = resolve_run(settings, card, find_device(settings.model.device), earlier)
    return AzureDeployment(settings, card, compute, rules, record, earlier)


def read_cached_run(out: Path) -> dict[str, Any] | None:
    """Return run.json, which another worker may just have written, or None where OUT has none. Raises UsageError.

    Disks show the old file or the new one. A mount of a storage account that caches the sizes of files, as blobfuse
    does, may for a while show a new file cut to the size of the old one.
    """
    for _ in range(LOOKS - 1):
        with suppress(UsageError):
            return read_run(out)
        time.sleep(LOOK_SECONDS)
    return read_run(out)


def _settings(settings: RunSettings, *, alone: bool) -> RunSettings:
    told = {"BATCH_INFER_OVERWRITE": settings.overwrite, "BATCH_INFER_LIMIT": settings.table.limit}
    told["BATCH_INFER_ID_FROM"] = settings.table.id_from != "row"
    for name in (name for name, value in told.items() if value):
        raise SettingsError(f"{name} is set, and here tables come one after the other, to several workers")
    if settings.compute.slots == "auto":
        raise SettingsError("BATCH_INFER_SLOTS=auto: say a number here; `batch-infer bench` tells what suits a device")
    table = TableSettings((), settings.table.columns)
    workers = 1 if alone else settings.compute.processes or _gpus() or 1
    safety = settings.safety.split_among(workers)
    return make_paths_absolute(replace(settings, table=table, model=_model(settings.model), safety=safety))


def _model(settings: ModelSettings) -> ModelSettings:
    """BATCH_INFER_MODEL, else what is registered with the deployment, else the built-in model."""
    folder = os.environ.get("AZUREML_MODEL_DIR", "")
    return settings if settings.name or not folder else replace(settings, name=find_model_path(Path(folder)))


def find_model_path(folder: Path) -> str:
    """The one diffusers folder, or else the one .safetensors file, at or below a folder. Raises SettingsError.

    Of several levels the uppermost counts; a file, which may be a LoRA, only where there is no folder on any.
    """
    told = f"AZUREML_MODEL_DIR={folder}"
    if not folder.is_dir():
        raise SettingsError(f"{told} is no folder: register a model with the deployment, or set BATCH_INFER_MODEL")
    for found in (*_models(folder, folders=True), *_models(folder, folders=False)):
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in found)
            raise SettingsError(f"{told} holds several models ({names}): name one by BATCH_INFER_MODEL")
        if found:
            return str(found[0])
    raise SettingsError(f"{told} holds no model: register a diffusers folder (with {_FOLDER}) or a {_FILE} file")


def _models(folder: Path, *, folders: bool) -> Iterator[list[Path]]:
    """The diffusers folders of each level, or else its files of weights, from the uppermost level down."""
    level = [folder]
    for _ in range(MODEL_DEPTH + 1):
        inner = [path for parent in level for path in sorted(parent.iterdir())]
        yield [path for path in (level if folders else inner) if _is_model(path, folders=folders)]
        level = [path for path in inner if path.is_dir()]


def _is_model(path: Path, *, folders: bool) -> bool:
    return (path / _FOLDER).is_file() if folders else path.suffix == _FILE


def _refuse_worker_without_gpu(settings: RunSettings) -> None:
    """Azure gives each worker a GPU by CUDA_VISIBLE_DEVICES, and those beyond the last no variable at all.

    Such a one would share the first one's, and its memory. Raises SettingsError.
    """
    if _gpus() and "CUDA_VISIBLE_DEVICES" not in os.environ and settings.model.device != "cpu":
        raise SettingsError(
            "this worker has no GPU of its own: set max_concurrency_per_instance to the GPUs of an instance"
            f" ({_gpus()})"
        )


def _gpus() -> int:
    """Those of this instance, as Azure has counted them: a batch job has a worker for each."""
    found = os.environ.get("AZ_BATCHAI_GPU_COUNT_FOUND", "")
    return int(found) if found.isdecimal() else 0
