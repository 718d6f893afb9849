"""Export an MLflow model for no-code deployments, whose signature extends that of Azure's text-to-image models.

The MLflow model contains the diffusion model and the code of batch-infer. MLflow runs model.py instead of unpickling an
object (https://mlflow.org/docs/latest/ml/model/models-from-code).
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # an export must not send usage data
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
"""The signature of the text-to-image models in Azure's catalog, plus `error` and parameters for all rows of a call."""
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


def export_model(folder: Path, model: ModelSettings, compute: ComputeSettings) -> ModelCard:
    """Export a model atomically to a new or empty folder, and return its card.

    Raises SettingsError, ModelError, StorageError.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"{folder} already exists; name a folder that is new or empty")
    if compute.slots == "auto":
        raise SettingsError("--slots auto: give a number here; `batch-infer bench --slots auto` finds one")
    if model.lora_folder:
        raise SettingsError("--lora-folder: an exported model cannot contain a folder of LoRAs; use --lora")
    card, target = read_card(model), folder.absolute()
    extras = ["azure", *["lora"] * bool(card.loras), *["long-prompts"] * model.long_prompts]
    extras += ["quantize"] * bool(model.quantize)
    # The temporary folder is next to the target, so that it can be renamed to it. If the model is on the same disk, its
    # files are hard-linked and take no space.
    temporary = temporary_path(target)
    scratch = temporary / "scratch"
    with write_errors(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in target.parent.glob(f"{TEMPORARY_PREFIX}*-{glob.escape(target.name)}*"):
            if is_abandoned(path.name) and path.is_dir() and not path.is_symlink():  # left by a killed export
                shutil.rmtree(path, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            _save(temporary / "model", scratch, card, _make_variables(card, model, compute), extras)
            (temporary / "model").replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return card


def _save(path: Path, scratch: Path, card: ModelCard, variables: Mapping[str, str], extras: Sequence[str]) -> None:
    """Save the model to the new folder `path`. `scratch` is an empty folder on the same disk as `path`."""
    code, package = scratch / "model.py", scratch / _PACKAGE.name
    code.write_text(CODE, "utf-8")
    # Leave the built-in model out of the package: if it is exported, it is an artifact like any other model.
    shutil.copytree(_PACKAGE, package, ignore=shutil.ignore_patterns("demo_model", "__pycache__"))
    name = card.path.name if card.path == DEMO_MODEL else card.name.rpartition("/")[2]  # the model's name in run.json
    files = {"model": (card.path, name)}
    files |= {
        f"lora-{number}": (lora.path, f"lora-{number}-{lora.path.name}") for number, lora in enumerate(card.loras)
    }
    files |= {
        f"embedding-{number}": (embedding.path, f"embedding-{number}-{embedding.path.name}")
        for number, embedding in enumerate(card.embeddings)
    }
    for artifact, (source, file_name) in files.items():
        (scratch / artifact).mkdir()
        # MLflow refuses symbolic links, such as those in the Hub's cache, so link or copy the files they point to.
        copy = partial(shutil.copytree, copy_function=_link_or_copy) if source.is_dir() else _link_or_copy
        copy(str(source), str(scratch / artifact / file_name))
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    pyfunc.save_model(
        path=str(path),
        python_model=str(code),
        artifacts={artifact: str(scratch / artifact / file_name) for artifact, (_, file_name) in files.items()},
        code_paths=[str(package)],
        signature=SIGNATURE,
        input_example=EXAMPLE,
        pip_requirements=_list_requirements(extras),
        model_config={"variables": dict(variables)},
    )


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(Path(source).resolve())
    except OSError:  # another disk, or no support for hard links
        shutil.copyfile(source, target)


def _make_variables(card: ModelCard, model: ModelSettings, compute: ComputeSettings) -> dict[str, str]:
    """Return an endpoint's environment variables. On startup, it replaces `{artifact}` with that artifact's path."""
    variables = {
        "VARIANT": card.variant,
        "DTYPE": None if model.dtype == "auto" else model.dtype,
        "DEVICE": None if model.device == "auto" else model.device,
        "SCHEDULER": str(model.scheduler) if model.scheduler else None,
        "LONG_PROMPTS": "true" if model.long_prompts else None,
        "QUANTIZE": model.quantize,
        "SLOTS": compute.slots,
        "THREADS": compute.threads,
        "COMPILE": None if compute.compiled is None else str(compute.compiled).lower(),
        "LORA": ";".join(f"{{lora-{number}}}:{lora.weight!r}" for number, lora in enumerate(card.loras)) or None,
        "EMBEDDING": ";".join(
            f"{{embedding-{number}}}:{embedding.token}" for number, embedding in enumerate(card.embeddings)
        )
        or None,
        "MODEL": "{model}",
    }
    return {f"BATCH_INFER_{option}": str(value) for option, value in variables.items() if value is not None}


def _list_requirements(extras: Sequence[str]) -> list[str]:
    """Return the requirements of batch-infer with these extras, but not batch-infer, whose code is in the model.

    The packages in PINNED, which affect pixels, are pinned to their installed versions. More pins could conflict with
    those of MLflow.
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
