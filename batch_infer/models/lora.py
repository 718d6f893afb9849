"""Recognize LoRAs (Hu et al., arXiv 2106.09685) by their headers and fuse them into weights with diffusers and peft."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError, first_line
from batch_infer.models.untrusted import LOADING_ERRORS, describe, hash_file, read_shapes
from batch_infer.settings import LoraSpec

NAME_PARTS = ("lora_", ".lora", "hada_w", "lokr_")
"""Substrings of tensor names in LoRA files. The last two occur in LoHa and LoKr files."""
UNSUPPORTED_NAME_PARTS = ("dora_scale", "lora_magnitude_vector", "hada_w", "lokr_")
"""Substrings of tensor names in DoRA, LoHa and LoKr files, which are refused."""
UNSUPPORTED_SUFFIXES = (".diff", ".diff_b", ".set_weight")
"""Suffixes of the names of full weights and full differences, which are also refused."""
ADAPTER = "lora"

# Mute the log message on why a LoRA does not fit, because diffusers also raises an error with the same text.
logging.getLogger("diffusers.loaders.peft").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Lora:
    """A local LoRA file and its weight. `tensors` is the number of tensors that the model must load."""

    path: Path
    weight: float
    fingerprint: str
    tensors: int

    def __str__(self) -> str:
        return f"{self.path.stem}:{self.weight:g}"


def is_lora(names: Collection[str]) -> bool:
    """Return whether any tensor name belongs to a LoRA."""
    return any(part in name for name in names for part in NAME_PARTS)


def read_lora(spec: LoraSpec) -> Lora:
    """Read the header of a LoRA file, and hash the file.

    Raises ModelError for a file that is missing, unreadable or damaged, or not a plain LoRA.
    """
    path = Path(spec.file).expanduser().absolute()
    if not path.is_file():
        raise ModelError(f"--lora {spec.file}: there is no such file")
    names = read_shapes(path, str(path)).keys()
    if not is_lora(names):
        raise ModelError(f"{path} is not a LoRA: none of its tensors has a LoRA's name")
    for name in names:
        if name.endswith(UNSUPPORTED_SUFFIXES) or any(part in name for part in UNSUPPORTED_NAME_PARTS):
            raise ModelError(
                f"{path} contains {name}: only plain LoRA is supported, not DoRA, LoHa, LoKr or full differences"
            )
    return Lora(path, spec.weight, hash_file(path), sum(not name.endswith("alpha") for name in names))


def fuse_lora(pipeline: Any, lora: Lora, model: str) -> None:
    """Fuse a LoRA into the weights of a loaded pipeline.

    Raises ModelError if the LoRA cannot be loaded, does not fit or makes weights non-finite.

    The loaded tensors are counted, because diffusers silently drops tensors that do not match the model.
    """
    misfit = f"{lora.path} does not fit {model}; was it made for another family?"
    try:
        pipeline.load_lora_weights(
            str(lora.path.parent), weight_name=lora.path.name, adapter_name=ADAPTER, use_safetensors=True,
            local_files_only=True,
        )  # fmt: skip
    except LOADING_ERRORS as error:
        raise ModelError(f"{misfit} ({describe(error)})") from error
    networks = [network for network in pipeline.components.values() if hasattr(network, "named_parameters")]
    loaded = sum(f".{ADAPTER}." in name for network in networks for name, _ in network.named_parameters())
    if loaded != lora.tensors:
        raise ModelError(f"{misfit} (only {loaded} of its {lora.tensors} tensors match the model)")
    pipeline.set_adapters(ADAPTER, lora.weight)
    try:
        pipeline.fuse_lora(safe_fusing=True)
    except ValueError as error:
        raise ModelError(f"{lora.path} cannot be added to {model}: {first_line(error)}") from error
    pipeline.unload_lora_weights()
