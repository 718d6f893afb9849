"""Export an MLflow model for no-code deployments, with the signature of the catalog's text-to-image models.

It contains a diffusers folder and batch-infer itself, but no pickle: MLflow runs its model.py
(https://mlflow.org/docs/latest/ml/model/models-from-code).
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # packaging a model needs no network
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import pandas as pd
from mlflow import pyfunc
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from batch_infer.errors import SettingsError
from batch_infer.models import DEMO_MODEL, ModelCard, read_card
from batch_infer.settings import ComputeSettings, ModelSettings
from batch_infer.store import TEMPORARY_PREFIX, is_abandoned, temporary_path, write_errors

EXAMPLE = pd.DataFrame({"prompt": ["A photo of an astronaut riding a horse on Mars"]})
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "prompt"),
            ColSpec(DataType.string, "generated_image", required=False),
            ColSpec(DataType.boolean, "nsfw_content_detected", required=False),
            ColSpec(DataType.string, "error", required=False),
        ]
    ),
    params=ParamSchema(
        [
            ParamSpec("num_inference_steps", DataType.long, None),
            ParamSpec("guidance_scale", DataType.double, None),
            ParamSpec("height", DataType.long, None),
            ParamSpec("width", DataType.long, None),
            ParamSpec("seed", DataType.long, None),
            ParamSpec("negative_prompt", DataType.string, None),
        ]
    ),
)
"""The catalog models' signature, plus `error` and parameters for all rows of a call. None is the model's default."""
CODE = """\
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from batch_infer.azureml.pyfunc import PromptsToImages


class Model(PromptsToImages, PythonModel):
    pass


set_model(Model())
"""
PINNED = ("torch", "diffusers", "transformers")
_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class _Parts:
    """The contents of an MLflow model.

    `files` maps each artifact's name to its source path and its file name in the model. In variables, an artifact's
    name in braces is replaced by its path.
    """

    files: Mapping[str, tuple[Path, str]]
    variables: Mapping[str, str]
    extras: frozenset[str]


def export_model(folder: Path, model: ModelSettings, compute: ComputeSettings) -> ModelCard:
    """Write the model atomically to a new or empty folder. Raises SettingsError, ModelError, StorageError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"{folder} already exists; name a folder that is new or empty")
    card = read_card(model)
    parts = _collect_parts(card, model, compute)
    # Next to the folder: if the model is on the same disk, its files are hard-linked and take no space.
    temporary = temporary_path(folder.absolute())
    with write_errors(folder):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.absolute())
        scratch = temporary / "scratch"
        try:
            scratch.mkdir(parents=True)
            _save(temporary / "model", parts, scratch)
            (temporary / "model").replace(folder.absolute())
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return card


def _remove_abandoned(folder: Path) -> None:
    """Remove the partial copies that killed exports to this folder left next to it."""
    for path in folder.parent.glob(f"{TEMPORARY_PREFIX}*-{glob.escape(folder.name)}*"):
        if is_abandoned(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _save(path: Path, parts: _Parts, scratch: Path) -> None:
    code, package = scratch / "model.py", scratch / _PACKAGE.name
    code.write_text(CODE, "utf-8")
    # If the built-in model is exported, it is an artifact like any other model.
    shutil.copytree(_PACKAGE, package, ignore=shutil.ignore_patterns("demo_model", "__pycache__"))
    for name, (source, file_name) in parts.files.items():
        _copy(source, scratch / name / file_name)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    pyfunc.save_model(
        path=str(path),
        python_model=str(code),
        artifacts={name: str(scratch / name / file_name) for name, (_, file_name) in parts.files.items()},
        code_paths=[str(package)],
        signature=SIGNATURE,
        input_example=EXAMPLE,
        pip_requirements=_list_requirements(parts.extras),
        model_config={"variables": dict(parts.variables)},
    )


def _copy(source: Path, target: Path) -> None:
    """Copy or hard-link a file or folder. Follow the symbolic links of the Hub's cache, which MLflow refuses."""
    target.parent.mkdir()
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_or_copy)
    else:
        _link_or_copy(str(source), str(target))


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(Path(source).resolve())
    except OSError:  # another disk, or no support for hard links
        shutil.copyfile(source, target)


def _collect_parts(card: ModelCard, model: ModelSettings, compute: ComputeSettings) -> _Parts:
    variables = {
        "VARIANT": card.variant,
        "DTYPE": None if model.dtype == "auto" else model.dtype,
        "DEVICE": None if model.device == "auto" else model.device,
        "SCHEDULER": str(model.scheduler) if model.scheduler else None,
        "LONG_PROMPTS": "true" if model.long_prompts else None,
        "SLOTS": compute.slots,
        "THREADS": compute.threads,
        "COMPILE": None if compute.compiled is None else str(compute.compiled).lower(),
        "LORA": ";".join(f"{{lora-{number}}}:{lora.weight!r}" for number, lora in enumerate(card.loras)) or None,
        "MODEL": "{model}",
    }
    if compute.slots == "auto":
        raise SettingsError("--slots auto: give a number here; `batch-infer bench` measures which one suits a device")
    extras = {"azure"}
    if card.loras:
        extras.add("lora")
    if model.long_prompts:
        extras.add("long-prompts")
    name = card.path.name if card.path == DEMO_MODEL else card.name.rpartition("/")[2]  # image metadata contains it
    loras = {f"lora-{number}": (lora.path, f"lora-{number}-{lora.path.name}") for number, lora in enumerate(card.loras)}
    return _Parts(
        files={"model": (card.path, name), **loras},
        variables={f"BATCH_INFER_{option}": str(value) for option, value in variables.items() if value is not None},
        extras=frozenset(extras),
    )


def _list_requirements(extras: frozenset[str]) -> list[str]:
    """Return the dependencies of batch-infer, whose code is part of the model.

    Packages that affect pixels are pinned to the installed versions. More pins would conflict with MLflow's.
    """
    requirements = []
    for line in metadata.requires("batch-infer") or []:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if "extra" not in marker:
            requirements.append(line)
        elif any(f'extra == "{extra}"' in marker for extra in extras):
            requirements.append(requirement)
    return [_pin(line) for line in requirements]


def _pin(requirement: str) -> str:
    for name in PINNED:
        if requirement.startswith(name) and not requirement[len(name)].isalnum():
            return f"{name}=={metadata.version(name).partition('+')[0]}"  # without the build tag, such as +cpu
    return requirement
