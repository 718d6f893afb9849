"""Convert single-file checkpoints into diffusers folders in the user's cache, once per file content."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from batch_infer.errors import ModelError
from batch_infer.models.components import check_vocabularies, named_components
from batch_infer.models.lora import is_lora
from batch_infer.models.untrusted import PICKLE_SUFFIXES, check_weights, hash_file, read_object, read_shapes
from batch_infer.store import fsync

CACHE_FOLDER = "converted-1"
"""Folder for converted checkpoints in the user's cache. Increase the number when the conversion changes."""
PARTS = {
    "UNet": ("model.diffusion_model.",),
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}
"""Prefixes of the tensor names of each part of a complete checkpoint."""

log = logging.getLogger("batch_infer")


def convert_once(file: Path) -> Path:
    """Return the diffusers folder of a Stable Diffusion 1.x, 2.x or XL file, converting the file on first use.

    The folder's name is a digest of the file's content. Raises ModelError.
    """
    if file.suffix in PICKLE_SUFFIXES:
        raise ModelError(f"{file} is pickled, and reading a pickle can run code; convert the checkpoint to safetensors")
    if file.suffix != ".safetensors":
        raise ModelError(f"{file} is not a .safetensors file; use one, or a folder with model_index.json")
    shapes = read_shapes(file, str(file))
    _refuse_parts(file, shapes)
    folder = user_cache_path("batch-infer") / CACHE_FOLDER / hash_file(file)
    try:
        if not folder.is_dir():
            _convert(file, shapes, folder)
    except OSError as error:
        raise ModelError(f"{file} could not be converted into {folder}: {error}") from error
    return folder


def _refuse_parts(file: Path, names: Collection[str]) -> None:
    """Raise ModelError for a LoRA, a ControlNet or an incomplete checkpoint."""
    if is_lora(names):
        raise ModelError(f"{file} is a LoRA: name it in --lora, and its base model in --model")
    if any(name.startswith(("control_model.", "controlnet_cond_embedding.")) for name in names):
        raise ModelError(f"{file} is a ControlNet, which needs an image in addition to the prompt")
    if missing := [part for part, prefixes in PARTS.items() if not any(name.startswith(prefixes) for name in names)]:
        raise ModelError(
            f"{file} has no tensors of a checkpoint's {' and '.join(missing)}: use a complete checkpoint of Stable "
            "Diffusion, or a folder with model_index.json"
        )


def _convert(file: Path, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Convert and check a checkpoint in a temporary folder, then rename it to `folder`.

    Only one process at a time converts to the same `folder`.
    """
    from batch_infer.models.conversion import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        log.info("converting %s into a diffusers folder, once", file)
        temporary = folder.with_name(f".tmp-{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            convert(file, shapes, temporary)
            name = "the configs of its base model"  # for errors, since the Hub's cache may be incomplete
            components = named_components(read_object(temporary / "model_index.json", name), name)
            check_weights(temporary, components, name, None)
            check_vocabularies(temporary, components, name)
            for path in temporary.rglob("*.*"):
                fsync(path)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
