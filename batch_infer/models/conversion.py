"""Convert a single-file checkpoint into a diffusers folder with diffusers' reader."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    SingleFileComponentError,
    infer_diffusers_model_type,
)
from transformers import PreTrainedModel

from batch_infer.errors import ModelError, first_line
from batch_infer.models.hub import INDEX, fetch_configs
from batch_infer.models.untrusted import CONFIG_SUFFIXES, LOADING_ERRORS, describe, read_object

PIPELINES: dict[str, Any] = {
    "v1": StableDiffusionPipeline,
    "v2": StableDiffusionPipeline,
    "xl_base": StableDiffusionXLPipeline,
}
"""Pipeline class for each supported type of checkpoint. diffusers infers more types."""
ABSENT_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of the base model's repository that a single file does not contain."""
READING_ERRORS = (*LOADING_ERRORS, SingleFileComponentError)

log = logging.getLogger("batch_infer")


def convert(file: Path, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Write a checkpoint's weights and its base model's configs and vocabularies as a diffusers folder.

    `shapes` are the tensor shapes of `file` by name. Configs and vocabularies, a few small files, come from the Hub or
    its local cache. Raises ModelError.
    """
    kind = infer_kind(shapes)
    if kind not in PIPELINES:
        raise ModelError(f"{file} is a {kind} checkpoint; only files of Stable Diffusion 1.x, 2.x and XL are converted")
    if any(key.endswith("time_embed.cond_proj.weight") for key in shapes):
        raise ModelError(f"{file} is a latent consistency model: use its diffusers folder, which names its scheduler")
    repository = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    _copy_configs(file, repository, folder)
    _write_networks(file, PIPELINES[kind], folder)
    _set_scheduler(file, kind, shapes, folder)


def infer_kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the type of checkpoint that diffusers infers from tensor names and shapes."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return str(infer_diffusers_model_type(tensors))


def _copy_configs(file: Path, repository: str, folder: Path) -> None:
    """Copy only configs and vocabularies: the Hub's local cache may also contain code and the base model's weights."""
    try:
        configs = fetch_configs(repository)
    except ModelError as error:
        raise ModelError(
            f"{file} needs the configs and vocabularies of {repository}, a few small files: {error}; a diffusers "
            "folder as --model needs no network"
        ) from error
    index = read_object(configs / INDEX, repository)
    index |= {name: [None, None] for name in ABSENT_COMPONENTS if name in index}
    for component, value in index.items():
        if isinstance(value, list) and value[0] is not None:
            (folder / component).mkdir(parents=True)
            for source in sorted((configs / component).glob("*")):
                if source.suffix in CONFIG_SUFFIXES and not source.name.endswith(".index.json"):
                    shutil.copyfile(source, folder / component / source.name)
    (folder / INDEX).write_text(json.dumps({**index, "requires_safety_checker": False}, indent=2), "utf-8")


def _write_networks(file: Path, pipeline_class: Any, folder: Path) -> None:
    """Write the weights but not diffusers' configs, which contain a path and a version."""
    absent = dict.fromkeys(ABSENT_COMPONENTS[:2])
    try:
        pipeline = pipeline_class.from_single_file(str(file), config=str(folder), local_files_only=True, **absent)
    except NotImplementedError as error:  # torch raises it for missing tensors, which are on the meta device
        raise ModelError(f"{file} lacks tensors of a network; is the file complete? ({first_line(error)})") from error
    except READING_ERRORS as error:
        raise ModelError(f"{file} could not be read by diffusers: {describe(error)}") from error
    for name, module in pipeline.components.items():
        if not isinstance(module, (ModelMixin, PreTrainedModel)):
            continue
        if missing := [key for key, weight in module.named_parameters() if weight.is_meta]:
            raise ModelError(f"{file} lacks tensors of its {name}, such as {missing[0]}; is the file complete?")
        config = (folder / name / "config.json").read_bytes()
        _narrow(module).save_pretrained(folder / name, safe_serialization=True)
        (folder / name / "config.json").write_bytes(config)


def _narrow(module: Any) -> Any:
    """Convert weights back to half precision, from which diffusers may have widened them, if that is lossless."""
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(weight, weight.to(dtype).to(weight.dtype)) for weight in module.parameters()):
            return module.to(dtype)
    return module


def _set_scheduler(file: Path, kind: str, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Set velocity prediction if the file has a tensor `v_pred`, and zero terminal SNR if it also has `ztsnr`.

    Logs a warning for 2.x checkpoints without `v_pred`.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_object(path, file.name)
    if "v_pred" in shapes:
        scheduler |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in shapes}
        path.write_text(json.dumps(scheduler, indent=2), "utf-8")
    elif kind == "v2":
        log.warning(
            "%s does not define its prediction type; assuming velocity, as in Stable Diffusion 2.1 at 768x768. For a "
            "base checkpoint add --scheduler %s:prediction_type=epsilon --height 512 --width 512",
            file,
            scheduler["_class_name"],
        )
