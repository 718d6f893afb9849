"""Reading files of an untrusted checkpoint: bounded JSON, safetensors headers, and the errors of libraries on the rest.

Weights are read from safetensors only: unpickling a file runs whatever code it holds.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from batch_infer.errors import ModelError, first_line

MAX_DEPTH = 64
"""Levels of nesting in a JSON file; libraries copy and print what they read by recursion."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SMALL = (".json", ".txt", ".model", ".jinja")
"""Suffixes of configs and vocabularies: the files of a component that are read besides its weights."""
MAX_HEADER = 100_000_000
"""Longest safetensors header in bytes that the library reads."""
MAX_SIDE = 1 << 40
"""Longest side of a tensor."""
LFS_POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer, in place of a file that was not fetched."""
LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,  # RecursionError and NotImplementedError are RuntimeErrors
    LookupError,
    ArithmeticError,
    AssertionError,
    ImportError,
    MemoryError,
    SafetensorError,
)
"""Errors of diffusers, transformers and torch for a folder whose content is not as declared."""
LIBRARIES = ("accelerate", "diffusers", "huggingface_hub", "safetensors", "tokenizers", "transformers")
"""Packages whose own error classes, where they are not subclasses of these, mean the same."""


class LoadingErrors:
    """Context manager that turns errors of libraries into a ModelError naming `place`, a folder or file.

    Device errors are re-raised unchanged: they say nothing about the checkpoint.
    """

    def __init__(self, place: object) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_library_error = isinstance(error, LOADING_ERRORS) or (
            kind is not None and kind.__module__.partition(".")[0] in LIBRARIES
        )
        is_library_error |= kind is Exception  # tokenizers raises it
        if isinstance(error, Exception) and is_library_error and not _is_from_device(error):
            raise ModelError(f"{self._place} could not be loaded: {describe(error)}") from error


def describe(error: Exception) -> str:
    """Format a library's error in one line, with its type where the message alone says little, as a KeyError's does."""
    line = first_line(error)
    if line.endswith(":"):
        line = " ".join(part.strip() for part in str(error).strip().splitlines()[:2])
    plain = isinstance(error, (OSError, ValueError, TypeError, SafetensorError)) or type(error) is RuntimeError
    name = type(error).__name__
    return line if plain or line == name else f"{name}: {line}"


def _is_from_device(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from batch_infer.accelerator import is_device_fault, is_out_of_memory

    if isinstance(error, sys.modules["torch"].OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and (is_device_fault(error) or is_out_of_memory(error))


def parse_json(content: bytes, place: object) -> Any:
    """Parse a JSON file's bytes. Raises ModelError, naming `place`, for other content and deep nesting."""
    try:
        document = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ModelError(f"{place} is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise ModelError(f"{place} is not JSON: {error}") from error
    for depth, _ in enumerate(_levels(document), 1):
        if depth > MAX_DEPTH:
            raise ModelError(f"{place} is nested more than {MAX_DEPTH} levels deep")
    return document


def json_objects(document: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a parsed JSON document, outer ones first."""
    for level in _levels(document):
        yield from (value for value in level if isinstance(value, dict))


def _levels(document: Any) -> Iterator[list[Any]]:
    """Yield the objects and arrays of each level of nesting."""
    level = [document] if isinstance(document, (dict, list)) else []
    while level:
        yield level
        inner = (part for value in level for part in (value.values() if isinstance(value, dict) else value))
        level = [part for part in inner if isinstance(part, (dict, list))]


def read_json(path: Path, name: str) -> Any:
    """Read a JSON file of checkpoint `name`. Raises ModelError."""
    try:
        return parse_json(path.read_bytes(), f"{name}: {path}")
    except FileNotFoundError:
        raise ModelError(f"{name}: {path} is missing; is the folder complete?") from None
    except OSError as error:
        raise ModelError(f"{name}: {path} cannot be read: {error.strerror}") from error


def read_object(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ModelError."""
    document = read_json(path, name)
    if not isinstance(document, dict):
        raise ModelError(f"{name}: {path} does not hold a JSON object")
    return document


def is_loaded(file: PurePath, variant: str | None) -> bool:
    """Return whether a file has weights of a variant: `model.fp16.safetensors`, `model.fp16-00001-of-2.safetensors`."""
    _, *rest = file.name.removesuffix(".safetensors").split(".")
    named = rest[0].split("-")[0] if rest else None
    return file.suffix == ".safetensors" and named == variant


def choose_variant(files: Iterable[PurePath], variant: str | None) -> str | None:
    """Return the variant where a component's files include weights of it, else None for its plain weights."""
    return variant if variant and any(is_loaded(file, variant) for file in files) else None


def variant_of(folder: Path, variant: str | None) -> str | None:
    """Return `choose_variant` for the files of a component's folder."""
    return choose_variant(folder.glob("*.safetensors"), variant)


def list_weights(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files of a component that are loaded, in order of their names."""
    chosen = variant_of(folder, variant)
    return sorted(file for file in folder.glob("*.safetensors") if is_loaded(file, chosen))


def check_weights(path: Path, components: Iterable[str], name: str, variant: str | None) -> None:
    """Check that each component's folder exists, and that its weights are complete safetensors. Raises ModelError."""
    components = sorted(components)
    for component in components:
        folder = path / component
        if not folder.is_dir():
            raise ModelError(f"{name}: model_index.json names {component}/, which is missing; is the folder complete?")
        refuse_pickles(component, list(folder.iterdir()), name)
        loaded = list_weights(folder, variant)
        for file in (*loaded, *_list_shards(folder, variant_of(folder, variant))):
            read_header(file, f"{name}: {component}/{file.name}")
        others = sorted(folder.glob("*.safetensors"))
        if others and not loaded:
            raise ModelError(f"{name}: {component}/ has weights of a variant alone ({others[0].name}): set --variant")
    if variant and not any(variant_of(path / component, variant) for component in components):
        raise ModelError(f"{name} has no weights of variant {variant}")


def refuse_pickles(component: str, files: Collection[PurePath], name: str) -> None:
    """Raise ModelError where a component has pickled weights only."""
    pickles = sorted(file.name for file in files if file.suffix in PICKLES)
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(
            f"{name}: {component}/{pickles[0]} is pickled and pickles run code when read; "
            "convert the checkpoint to safetensors (save_pretrained does)"
        )


def _list_shards(folder: Path, variant: str | None) -> Iterator[Path]:
    """Yield the weight files that a component's index names, whether they exist or not. Raises ModelError."""
    infix = f".{variant}" if variant else ""
    for index in folder.glob(f"*.safetensors.index{infix}.json"):
        try:
            for file in sorted(set(read_object(index, folder.name)["weight_map"].values())):
                if Path(file).name != file or not is_loaded(Path(file), variant):
                    raise ModelError(f"{index} names {file}, which is no shard of this component's weights")
                yield folder / file
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not an index of weights: {error}") from error


def hash_files(path: Path, components: Iterable[str], variant: str | None) -> str:
    """Return the sha256 of the names and bytes of all files of components that are loaded. Raises ModelError."""
    total = hashlib.sha256()
    for component in sorted(components):
        folder = path / component
        chosen = variant_of(folder, variant)
        for file in sorted(folder.glob("*")):
            if file.suffix in SMALL or is_loaded(file, chosen):
                total.update(f"{component}/{file.name}\0".encode())
                _hash(total, file)
    return total.hexdigest()[:32]


def hash_file(file: Path) -> str:
    """Return the sha256 of a file's bytes, as 32 hexadecimal digits. Raises ModelError."""
    total = hashlib.sha256()
    _hash(total, file)
    return total.hexdigest()[:32]


def _hash(total: hashlib._Hash, file: Path) -> None:
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error


def read_shapes(folder: Path, variant: str | None, name: str) -> dict[str, tuple[int, ...]]:
    """Read the shape of each tensor of a component by its name. Raises ModelError."""
    files = list_weights(folder, variant)
    headers = [read_header(file, f"{name}: {folder.name}/{file.name}") for file in files]
    return {key: tuple(tensor["shape"]) for header in headers for key, tensor in header.items()}


def read_header(file: Path, name: str) -> dict[str, Any]:
    """Read the dtype, shape and offsets of each tensor of a safetensors file, which errors call `name`.

    The file starts with the header's length and the header; the last tensor's end gives the file's size. Raises
    ModelError where the size differs, or where a shape or an offset is impossible.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            if start + stream.read(len(LFS_POINTER) - 8) == LFS_POINTER:
                raise ModelError(f"{name} is a Git LFS pointer: fetch the weights with `git lfs pull`")
            stream.seek(8)
            length = int.from_bytes(start, "little")
            size = file.stat().st_size
            if length > MAX_HEADER:
                raise ModelError(f"{name} is not a safetensors file: its header would be {length} bytes long")
            header = parse_json(stream.read(length), f"the header of {name}") if 8 + length <= size else {}
            header.pop("__metadata__", None)
            ends = [_check_tensor(key, tensor, name) for key, tensor in header.items()]
    except FileNotFoundError:
        raise ModelError(f"{name} is missing; is the folder complete?") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{name} is not a safetensors file: {error}") from error
    if size != 8 + length + max(ends, default=0):
        raise ModelError(f"{name} is incomplete: fetch it again")
    return dict(header)


def _check_tensor(key: str, tensor: dict[str, Any], name: str) -> int:
    """Check a tensor's shape and offsets and return its end. Raises ModelError."""
    shape, offsets = tensor["shape"], tensor["data_offsets"]
    if not all(isinstance(part, list) and all(type(number) is int for number in part) for part in (shape, offsets)):
        raise ModelError(f"{name}: shape or data_offsets of {key} are not lists of whole numbers")
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] or not all(0 <= side <= MAX_SIDE for side in shape):
        raise ModelError(f"{name}: {key} cannot have shape {shape} and data_offsets {offsets}")
    return int(offsets[1])
