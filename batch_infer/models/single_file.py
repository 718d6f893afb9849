"""Checkpoints of one file: converted into a diffusers folder in the user's cache, once, and told from what is none."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from batch_infer.errors import ModelError
from batch_infer.models.components import named_components, refuse_no_words
from batch_infer.models.files import PICKLES, hash_file, read_header, refuse_unfit
from batch_infer.models.lora import is_lora
from batch_infer.models.untrusted import read_object
from batch_infer.store import fsync

CONVERTED = "converted-1"
"""Where converted folders lie in the user's cache; another number where they are made otherwise."""
PARTS = {
    "UNet": ("model.diffusion_model.",),
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}
"""How the names of the tensors begin in a whole checkpoint."""

log = logging.getLogger("batch_infer")


def converted(file: Path) -> Path:
    """The diffusers folder of a checkpoint of one file (Stable Diffusion 1.x, 2.x or XL), made where it is not there.

    It is named by the file's content. Raises ModelError.
    """
    if file.suffix in PICKLES:
        raise ModelError(f"{file} is pickled and pickles run code when read; convert the checkpoint to safetensors")
    if file.suffix != ".safetensors":
        raise ModelError(f"{file} is a file; give a .safetensors file or the folder that holds model_index.json")
    header = read_header(file, str(file))
    _refuse_parts(file, header)
    folder = user_cache_path("batch-infer") / CONVERTED / hash_file(file)
    try:
        if not folder.is_dir():
            _convert(file, header, folder)
    except OSError as error:
        raise ModelError(f"{file} could not be converted into {folder}: {error}") from error
    return folder


def _refuse_parts(file: Path, names: Collection[str]) -> None:
    """Raises ModelError for what is not a whole checkpoint, and says what it is."""
    if is_lora(names):
        raise ModelError(f"{file} is a LoRA: give it with --lora, beside the --model that it was made for")
    if any(name.startswith(("control_model.", "controlnet_cond_embedding.")) for name in names):
        raise ModelError(f"{file} is a ControlNet, which draws from a picture and not from a prompt alone")
    missing = [part for part, starts in PARTS.items() if not any(name.startswith(starts) for name in names)]
    if missing:
        raise ModelError(
            f"{file} has no tensors that are named as a checkpoint's {' and '.join(missing)} are: give a whole "
            "checkpoint of Stable Diffusion, or the folder that holds model_index.json"
        )


def _convert(file: Path, header: Mapping[str, Any], folder: Path) -> None:
    """Under another name until all is there, and by one process at a time."""
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
            _refuse_unusable(temporary)
            for made in temporary.rglob("*.*"):
                fsync(made)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_unusable(folder: Path) -> None:
    """What was not whole in the Hub's cache must not be kept in ours. Raises ModelError."""
    told = "the settings that it is read with"
    named = named_components(read_object(folder / "model_index.json", told), told)
    refuse_unfit(folder, named, told, None)
    refuse_no_words(folder, named, told)
