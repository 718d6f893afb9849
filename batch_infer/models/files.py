"""The weight files of a checkpoint's components: which are loaded, whether they are whole, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.untrusted import parse_json, read_object

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SMALL = (".json", ".txt", ".model", ".jinja")
"""Settings and words: what is read of a component beside its weights."""
MAX_HEADER = 100_000_000
"""Longest header in bytes that safetensors itself reads."""
MAX_SIDE = 1 << 40
"""Longest side of a tensor."""
POINTER = b"version https://git-lfs"
"""How a file begins that stands for one that was not fetched."""


def variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant, where this component has weights of it; else None, for its plain ones."""
    return variant_among(folder.glob("*.safetensors"), variant)


def variant_among(files: Iterable[PurePath], variant: str | None) -> str | None:
    """The same, told from the names of the component's files."""
    return variant if variant and any(is_loaded(file, variant) for file in files) else None


def is_loaded(file: PurePath, variant: str | None) -> bool:
    """Whether a file holds weights of this variant: `model.fp16.safetensors`, `model.fp16-00001-of-2.safetensors`."""
    _, *rest = file.name.removesuffix(".safetensors").split(".")
    named = rest[0].split("-")[0] if rest else None
    return file.suffix == ".safetensors" and named == variant


def refuse_unfit(path: Path, components: Iterable[str], name: str, variant: str | None) -> None:
    """See that each component's folder is there and whole, its weights in safetensors. Raises ModelError.

    Weights are read from safetensors alone: unpickling a file runs whatever code it holds.
    """
    components = sorted(components)
    for component in components:
        folder = path / component
        if not folder.is_dir():
            raise ModelError(f"{name}: model_index.json names {component}/, which is missing; is the folder complete?")
        refuse_pickles(component, list(folder.iterdir()), name)
        chosen = variant_of(folder, variant)
        for file in _wanted(folder, chosen):
            _refuse_partial(file, name)
        weights = sorted(folder.glob("*.safetensors"))
        if weights and not any(is_loaded(file, chosen) for file in weights):
            raise ModelError(f"{name}: {component}/ has weights of a variant alone ({weights[0].name}): say --variant")
    if variant and not any(variant_of(path / component, variant) for component in components):
        raise ModelError(f"{name} has no weights of variant {variant}")


def hash_files(path: Path, components: Iterable[str], variant: str | None) -> str:
    """Return the sha256 of the names and bytes of all that is loaded of these components. Raises ModelError."""
    total = hashlib.sha256()
    for component in sorted(components):
        folder = path / component
        for file in sorted(folder.glob("*")):
            if file.suffix in SMALL or is_loaded(file, variant_of(folder, variant)):
                total.update(f"{component}/{file.name}\0".encode())
                _update(total, file)
    return total.hexdigest()[:32]


def hash_file(file: Path) -> str:
    """Return the sha256 of a file's bytes, as 32 hexadecimal digits. Raises ModelError."""
    total = hashlib.sha256()
    _update(total, file)
    return total.hexdigest()[:32]


def _update(total: hashlib._Hash, file: Path) -> None:
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error


def refuse_pickles(component: str, files: Collection[PurePath], name: str) -> None:
    """Raises ModelError where a component's weights are in pickles alone."""
    pickles = sorted(file.name for file in files if file.suffix in PICKLES)
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(
            f"{name}: {component}/{pickles[0]} is pickled and pickles run code when read; "
            "convert the checkpoint to safetensors (save_pretrained does)"
        )


def _wanted(folder: Path, variant: str | None) -> Iterator[Path]:
    """The weight files of a component that are there, and those that its index names and that should be."""
    yield from (file for file in sorted(folder.glob("*.safetensors")) if is_loaded(file, variant))
    infix = f".{variant}" if variant else ""
    for index in folder.glob(f"*.safetensors.index{infix}.json"):
        try:
            named = sorted(set(read_object(index, folder.name)["weight_map"].values()))
            for file in named:
                if Path(file).name != file or not is_loaded(Path(file), variant):
                    raise ModelError(f"{index} names {file}, which is no shard of this component's weights")
            yield from (folder / file for file in named)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of weights: {error}") from error


def _refuse_partial(file: Path, name: str) -> None:
    read_header(file, f"{name}: {file.parent.name}/{file.name}")


def read_shapes(folder: Path, variant: str | None, name: str) -> dict[str, tuple[int, ...]]:
    """Read the shape of each tensor that is loaded of a component, by its name. Raises ModelError."""
    chosen = variant_of(folder, variant)
    headers = [
        read_header(file, f"{name}: {folder.name}/{file.name}")
        for file in sorted(folder.glob("*.safetensors"))
        if is_loaded(file, chosen)
    ]
    return {key: tuple(tensor["shape"]) for header in headers for key, tensor in header.items()}


def read_header(file: Path, name: str) -> dict[str, Any]:
    """Read the dtype, shape and offsets of each tensor of a safetensors file. `name` is that of the file in errors.

    The file says in its first bytes how long it is: the header's length, the header, the tensors' ends. Raises
    ModelError where it is not as long as that, or where a shape or an offset is impossible.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if start + stream.read(len(POINTER) - 8) == POINTER:
                raise ModelError(f"{name} is a Git LFS pointer: fetch the weights with `git lfs pull`")
            stream.seek(8)
            length = int.from_bytes(start, "little")
            size = file.stat().st_size
            if length > MAX_HEADER:
                raise ModelError(f"{name} is not a safetensors file: its header would be {length} bytes long")
            header = parse_json(stream.read(length), f"the header of {name}") if 8 + length <= size else {}
            header.pop("__metadata__", None)
            ends = [_end(key, tensor, name) for key, tensor in header.items()]
    except FileNotFoundError:
        raise ModelError(f"{name} is missing; is the folder complete?") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{name} is not a safetensors file: {error}") from error
    if size != 8 + length + max(ends, default=0):
        raise ModelError(f"{name} is not whole: fetch it again")
    return dict(header)


def _end(key: str, tensor: dict[str, Any], name: str) -> int:
    """Return where a tensor ends, once its shape and offsets are found to be possible. Raises ModelError."""
    shape, offsets = tensor["shape"], tensor["data_offsets"]
    if not all(isinstance(part, list) and all(type(number) is int for number in part) for part in (shape, offsets)):
        raise ModelError(f"{name}: shape or data_offsets of {key} are not lists of whole numbers")
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] or not all(0 <= side <= MAX_SIDE for side in shape):
        raise ModelError(f"{name}: {key} cannot have shape {shape} and data_offsets {offsets}")
    return int(offsets[1])
