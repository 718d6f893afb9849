"""Recognize LoRAs (Hu et al., arXiv 2106.09685) and DoRAs (Liu et al., arXiv 2402.09353) by their headers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from batch_infer.errors import ModelError, RowError
from batch_infer.models.untrusted import hash_file, read_shapes
from batch_infer.records import Lora
from batch_infer.settings import LoraSpec, parse_weight

NAME_PARTS = ("lora_", ".lora", "hada_w", "lokr_")
"""Substrings of tensor names in LoRA files. The last two occur in LoHa and LoKr files."""
UNSUPPORTED_NAME_PARTS = ("hada_w", "lokr_", "lora_mid")
"""Substrings of tensor names in LoHa, LoKr and Tucker-decomposed files, which are refused."""
FORBIDDEN_CHARACTERS = '/\\:*?"<>|'
"""Characters that separate folders, drives or streams on some system, or that file names cannot contain."""
MAX_NAME_LENGTH = 200
"""Maximum length of the name of a row's LoRA."""
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


class LoraFolder:
    """Finds the LoRAs that rows name in the folder of --lora-folder. A file is hashed once, unless it changes."""

    def __init__(self, folder: str) -> None:
        """Raises ModelError if there is no such folder."""
        self._folder = Path(folder).expanduser().absolute()
        self._digests: dict[str, tuple[tuple[int, int], str]] = {}
        """The size and modification time of each file that a row names, and its digest."""
        if not self._folder.is_dir():
            raise ModelError(f"--lora-folder {folder}: there is no such folder")

    def find(self, text: str) -> Lora:
        """Return the LoRA of a cell, `NAME` or `NAME:WEIGHT`. Raises RowError.

        NAME is the name of a file in the folder, without `.safetensors`.
        """
        name, colon, number = text.strip().rpartition(":") if ":" in text else (text.strip(), "", "")
        try:
            weight = parse_weight(number) if colon else 1.0
        except ValueError as error:
            raise RowError(f"lora {text!r}: {error}") from error
        path = self._path_of(name)
        try:
            return Lora(path, weight, self._hash(path))
        except (ModelError, OSError) as error:
            raise RowError(f"lora {name!r}: {error}") from None

    def _path_of(self, name: str) -> Path:
        """Return the path of a file in the folder. Raises RowError for a name that could be outside it on any system.

        A link in the folder is followed.
        """
        is_plain = name.isprintable() and not set(FORBIDDEN_CHARACTERS) & set(name) and not name.startswith(".")
        if not name or not is_plain or len(name) > MAX_NAME_LENGTH:
            raise RowError(
                f"lora {name[:MAX_NAME_LENGTH]!r} is not a valid name: write a file's name without .safetensors"
            )
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            raise RowError(f"lora {name!r}: there is no {path.name} in {self._folder}")
        return path

    def _hash(self, path: Path) -> str:
        """Return the digest of a file. Raises ModelError, OSError."""
        status = path.stat()
        stamp = status.st_size, status.st_mtime_ns
        known = self._digests.get(path.name)
        if known is None or known[0] != stamp:
            check_lora(path)
            known = self._digests[path.name] = stamp, hash_file(path)
        return known[1]
