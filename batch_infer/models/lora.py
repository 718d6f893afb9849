"""Recognize LoRAs (Hu et al., arXiv 2106.09685) and DoRAs (Liu et al., arXiv 2402.09353) by their headers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from batch_infer.errors import ModelError
from batch_infer.models.untrusted import hash_file, read_shapes
from batch_infer.records import Lora
from batch_infer.settings import LoraSpec

NAME_PARTS = ("lora_", ".lora", "hada_w", "lokr_")
"""Substrings of tensor names in LoRA files. The last two occur in LoHa and LoKr files."""
UNSUPPORTED_NAME_PARTS = ("hada_w", "lokr_", "lora_mid")
"""Substrings of tensor names in LoHa, LoKr and Tucker-decomposed files, which are refused."""
UNSUPPORTED_SUFFIXES = (".diff", ".diff_b", ".set_weight")
"""Suffixes of the names of full weights and full differences, which are also refused."""


def is_lora(names: Collection[str]) -> bool:
    """Return whether any tensor name belongs to a LoRA."""
    return any(part in name for name in names for part in NAME_PARTS)


def read_lora(spec: LoraSpec) -> Lora:
    """Read the header of a file of --lora, and hash the file. Raises ModelError; see `check_lora`."""
    path = Path(spec.file).expanduser().absolute()
    if not path.is_file():
        raise ModelError(f"--lora {spec.file}: there is no such file")
    check_lora(path)
    return Lora(path, spec.weight, hash_file(path))


def check_lora(path: Path) -> None:
    """Raise ModelError for a file that is unreadable or damaged, or neither a LoRA nor a DoRA."""
    names = read_shapes(path, str(path)).keys()
    if not is_lora(names):
        raise ModelError(f"{path} is not a LoRA: none of its tensors has a LoRA's name")
    for name in names:
        if name.endswith(UNSUPPORTED_SUFFIXES) or any(part in name for part in UNSUPPORTED_NAME_PARTS):
            raise ModelError(
                f"{path} contains {name}: only LoRA and DoRA are supported, not LoHa, LoKr, Tucker decompositions or "
                "full differences"
            )
