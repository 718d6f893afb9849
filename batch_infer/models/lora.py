"""LoRAs (Hu et al., arXiv 2106.09685): files of what is to be added to a checkpoint's weights, told without torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from batch_infer.errors import ModelError
from batch_infer.models.files import hash_file, read_header
from batch_infer.settings import LoraSpec

FAMILIES = ("stable_diffusion", "stable_diffusion_xl")
MARKS = ("lora_", ".lora", "hada_w", "lokr_")
"""Of which the names of a LoRA's tensors have one; the last two are other ways to write an addition down."""
UNREAD = ("dora_scale", "lora_magnitude_vector", "hada_w", "lokr_")
"""Tensors that diffusers leaves out, or puts where these families' weights are not."""
DIFFERENCES = (".diff", ".diff_b", ".set_weight")
"""How the names of tensors end that are a whole difference or weight; diffusers leaves them out too."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA on this machine: `weight` times it is added. `tensors` is how many should find a place in the model."""

    path: Path
    weight: float
    fingerprint: str
    tensors: int

    def __str__(self) -> str:
        return f"{self.path.stem}:{self.weight:g}"


def is_lora(names: Collection[str]) -> bool:
    """Told from the names of a file's tensors."""
    return any(mark in name for name in names for mark in MARKS)


def read_loras(specs: Sequence[LoraSpec], family: str, model: str) -> tuple[Lora, ...]:
    """Find the LoRAs that a model of this family is to be given, and see that they are whole. Raises ModelError."""
    if not specs:
        return ()
    if family not in FAMILIES:
        raise ModelError(f"{model} is of the family {family}; --lora is for Stable Diffusion 1.x, 2.x and XL")
    if find_spec("peft") is None:
        raise ModelError("--lora needs peft: pip install 'batch-infer[lora]'")
    return tuple(map(_read, specs))


def _is_unread(name: str) -> bool:
    return name.endswith(DIFFERENCES) or any(mark in name for mark in UNREAD)


def _read(spec: LoraSpec) -> Lora:
    path = Path(spec.file).expanduser().absolute()
    if not path.is_file():
        raise ModelError(f"--lora {spec.file}: there is no such file")
    names = read_header(path, str(path)).keys()
    if not is_lora(names):
        raise ModelError(f"{path} is not a LoRA: no tensor of it bears a name of one")
    if unread := [name for name in names if _is_unread(name)]:
        raise ModelError(
            f"{path} holds {unread[0]}: DoRA, LoHa, LoKr and whole differences are not read, only plain LoRA"
        )
    return Lora(path, spec.weight, hash_file(path), sum(not name.endswith("alpha") for name in names))
