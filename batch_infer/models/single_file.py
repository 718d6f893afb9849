"""Convert single-file checkpoints once into diffusers folders in the user's cache."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from batch_infer.errors import ModelError
from batch_infer.models.components import check_vocabularies, named_components
from batch_infer.models.lora import is_lora
from batch_infer.models.untrusted import PICKLE_SUFFIXES, check_weights, hash_file, read_header, read_object
from batch_infer.store import fsync

CACHE_FOLDER = "converted-1"
"""Folder for converted checkpoints in the user's cache. A change of the conversion requires a new number."""
PARTS = {
    "UNet": ("model.diffusion_model.",),
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}
"""Tensor name prefixes of each part of a complete checkpoint."""

log = logging.getLogger("batch_infer")


def convert_once(file: Path) -> Path:
    """Return the diffusers folder of a Stable Diffusion 1.x, 2.x or XL file, converting the file on first use.

    The folder's name is a digest of the file's content. Raises ModelError.
    """
    if file.suffix in PICKLE_SUFFIXES:
        raise ModelError(f"{file} is pickled and pickles run code when read; convert the checkpoint to safetensors")
    if file.suffix != ".safetensors":
        raise ModelError(f"{file} is a file; give a .safetensors file or the folder that holds model_index.json")
    header = read_header(file, str(file))
    _refuse_parts(file, header)
    folder = user_cache_path("batch-infer") / CACHE_FOLDER / hash_file(file)
    try:
        if not folder.is_dir():
            _convert(file, header, folder)
    except OSError as error:
        raise ModelError(f"{file} could not be converted into {folder}: {error}") from error
    return folder


def _refuse_parts(file: Path, names: Collection[str]) -> None:
    """Raise ModelError for a LoRA, a ControlNet or an incomplete checkpoint."""
    if is_lora(names):
        raise ModelError(f"{file} is a LoRA: give it with --lora, and with --model the model that it was made for")
    if any(name.startswith(("control_model.", "controlnet_cond_embedding.")) for name in names):
        raise ModelError(f"{file} is a ControlNet, which needs an image besides the prompt")
    missing = [part for part, prefixes in PARTS.items() if not any(name.startswith(prefixes) for name in names)]
    if missing:
        raise ModelError(
            f"{file} has no tensors of a checkpoint's {' and '.join(missing)}: give a complete checkpoint of Stable "
            "Diffusion, or the folder that holds model_index.json"
        )


def _convert(file: Path, header: Mapping[str, Any], folder: Path) -> None:
    """Convert in a temporary folder, in one process at a time."""
    from batch_infer.models.conversion import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        log.info("converting %s into a diffusers folder, once", file)
        temporary = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            convert(file, header, temporary)
            _refuse_incomplete(temporary)
            for path in temporary.rglob("*.*"):
                fsync(path)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_incomplete(folder: Path) -> None:
    """Raise ModelError if files from the Hub's cache are incomplete."""
    name = "the configs of its kind of model"
    components = named_components(read_object(folder / "model_index.json", name), name)
    check_weights(folder, components, name, None)
    check_vocabularies(folder, components, name)
