"""Read and check the files of an untrusted checkpoint.

Weights are read only from safetensors files, because unpickling a file runs any code in it.
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
"""Maximum nesting of a JSON file. Libraries copy and print parsed files recursively."""
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
CONFIG_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Suffixes of configs and vocabularies. Other files of a component, except its weights, are not read."""
MAX_HEADER = 100_000_000
"""Maximum length in bytes of a safetensors header that the safetensors library reads."""
MAX_SIDE = 1 << 40
"""Maximum side of a tensor."""
LFS_POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer, which replaces a file until it is fetched."""
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
"""Errors that diffusers, transformers and torch raise for a folder with invalid files."""
LIBRARIES = ("accelerate", "diffusers", "huggingface_hub", "safetensors", "tokenizers", "transformers")
"""Packages whose error classes count as loading errors even if LOADING_ERRORS does not cover them."""


class LoadingErrors:
    """Context manager that converts library errors into a ModelError naming `source`, a folder or file.

    Device errors propagate unchanged, because the checkpoint does not cause them.
    """

    def __init__(self, source: object) -> None:
        self._source = source

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_library_error = isinstance(error, LOADING_ERRORS) or (
            exc_type is not None and exc_type.__module__.partition(".")[0] in LIBRARIES
        )
        is_library_error |= exc_type is Exception  # raised by tokenizers
        if isinstance(error, Exception) and is_library_error and not _is_from_device(error):
            raise ModelError(f"{self._source} could not be loaded: {describe(error)}") from error


def describe(error: Exception) -> str:
    """Format a library's error as one line, with its type if the message alone is unclear, such as a KeyError's."""
    line = first_line(error)
    if line.endswith(":"):
        line = " ".join(part.strip() for part in str(error).strip().splitlines()[:2])
    is_clear = isinstance(error, (OSError, ValueError, TypeError, SafetensorError)) or type(error) is RuntimeError
    name = type(error).__name__
    return line if is_clear or line == name else f"{name}: {line}"


def _is_from_device(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from batch_infer.accelerator import is_device_fault, is_out_of_memory

    if isinstance(error, sys.modules["torch"].OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and (is_device_fault(error) or is_out_of_memory(error))


def parse_json(content: bytes, source: object) -> Any:
    """Parse the bytes of a JSON file. Raises ModelError naming `source` for invalid JSON and deep nesting."""
    try:
        document = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ModelError(f"{source} is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise ModelError(f"{source} is not JSON: {error}") from error
    for depth, _ in enumerate(_levels(document), 1):
        if depth > MAX_DEPTH:
            raise ModelError(f"{source} is nested more than {MAX_DEPTH} levels deep")
    return document


def json_objects(document: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a parsed JSON document, outer objects first."""
    for level in _levels(document):
        yield from (value for value in level if isinstance(value, dict))


def _levels(document: Any) -> Iterator[list[Any]]:
    """Yield the list of objects and arrays at each nesting level, outermost first."""
    level = [document] if isinstance(document, (dict, list)) else []
    while level:
        yield level
        children: list[Any] = []
        for parent in level:
            children += parent.values() if isinstance(parent, dict) else parent
        level = [child for child in children if isinstance(child, (dict, list))]


def read_json(path: Path, name: str) -> Any:
    """Read a JSON file of checkpoint `name`. Raises ModelError."""
    try:
        return parse_json(path.read_bytes(), f"{name}: {path}")
    except FileNotFoundError:
        raise ModelError(f"{name}: {path} is missing; is the folder complete?") from None
    except OSError as error:
        raise ModelError(f"{name}: {path} cannot be read: {error.strerror}") from error


def read_object(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON file whose top level is an object. Raises ModelError."""
    document = read_json(path, name)
    if not isinstance(document, dict):
        raise ModelError(f"{name}: {path} does not hold a JSON object")
    return document


def is_loaded(file: PurePath, variant: str | None) -> bool:
    """Return whether a file has a variant's weights: `model.fp16.safetensors`, `model.fp16-00001-of-2.safetensors`."""
    _, *infixes = file.name.removesuffix(".safetensors").split(".")
    file_variant = infixes[0].split("-")[0] if infixes else None
    return file.suffix == ".safetensors" and file_variant == variant


def choose_variant(files: Iterable[PurePath], variant: str | None) -> str | None:
    """Return `variant` if a component's files include weights of that variant, else None for the default weights."""
    return variant if variant and any(is_loaded(file, variant) for file in files) else None


def variant_of(folder: Path, variant: str | None) -> str | None:
    """Apply `choose_variant` to the files in a component's folder."""
    return choose_variant(folder.glob("*.safetensors"), variant)


def list_weights(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files to load for a component, sorted by name."""
    chosen = variant_of(folder, variant)
    return sorted(file for file in folder.glob("*.safetensors") if is_loaded(file, chosen))


def check_weights(path: Path, components: Iterable[str], name: str, variant: str | None) -> None:
    """Check that each component has a folder and that its weights are complete safetensors. Raises ModelError."""
    components = sorted(components)
    for component in components:
        folder = path / component
        if not folder.is_dir():
            raise ModelError(f"{name}: model_index.json names {component}/, which is missing; is the folder complete?")
        refuse_pickles(component, list(folder.iterdir()), name)
        loaded = list_weights(folder, variant)
        for file in (*loaded, *_list_shards(folder, variant_of(folder, variant))):
            read_header(file, f"{name}: {component}/{file.name}")
        files = sorted(folder.glob("*.safetensors"))
        if files and not loaded:
            raise ModelError(f"{name}: {component}/ has weights of a variant alone ({files[0].name}): set --variant")
    if variant and not any(variant_of(path / component, variant) for component in components):
        raise ModelError(f"{name} has no weights of variant {variant}")


def refuse_pickles(component: str, files: Collection[PurePath], name: str) -> None:
    """Raise ModelError if a component has only pickled weights."""
    pickles = sorted(file.name for file in files if file.suffix in PICKLE_SUFFIXES)
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(
            f"{name}: {component}/{pickles[0]} is pickled and pickles run code when read; "
            "convert the checkpoint to safetensors (save_pretrained does)"
        )


def _list_shards(folder: Path, variant: str | None) -> Iterator[Path]:
    """Yield the weight files named by a component's index, including missing files. Raises ModelError."""
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
    """Return a sha256 digest of the names and bytes of the components' loaded files. Raises ModelError."""
    hasher = hashlib.sha256()
    for component in sorted(components):
        folder = path / component
        chosen = variant_of(folder, variant)
        for file in sorted(folder.glob("*")):
            if file.suffix in CONFIG_SUFFIXES or is_loaded(file, chosen):
                hasher.update(f"{component}/{file.name}\0".encode())
                _hash(hasher, file)
    return hasher.hexdigest()[:32]


def hash_file(file: Path) -> str:
    """Return the first 32 hexadecimal digits of the sha256 digest of a file's bytes. Raises ModelError."""
    hasher = hashlib.sha256()
    _hash(hasher, file)
    return hasher.hexdigest()[:32]


def _hash(hasher: hashlib._Hash, file: Path) -> None:
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                hasher.update(block)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error


def read_shapes(folder: Path, variant: str | None, name: str) -> dict[str, tuple[int, ...]]:
    """Map each tensor name of a component to the tensor's shape. Raises ModelError."""
    files = list_weights(folder, variant)
    headers = [read_header(file, f"{name}: {folder.name}/{file.name}") for file in files]
    return {key: tuple(tensor["shape"]) for header in headers for key, tensor in header.items()}


def read_header(file: Path, name: str) -> dict[str, Any]:
    """Read the dtype, shape and offsets of each tensor in a safetensors file. Error messages call the file `name`.

    The file contains the length of the header, the header and the tensors. Raises ModelError if the file does not end
    with the last tensor, or if a shape or offset is impossible.
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
    """Check a tensor's shape and offsets, and return its end offset. Raises ModelError."""
    shape, offsets = tensor["shape"], tensor["data_offsets"]
    if not all(isinstance(part, list) and all(type(number) is int for number in part) for part in (shape, offsets)):
        raise ModelError(f"{name}: shape or data_offsets of {key} are not lists of whole numbers")
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] or not all(0 <= side <= MAX_SIDE for side in shape):
        raise ModelError(f"{name}: {key} cannot have shape {shape} and data_offsets {offsets}")
    return int(offsets[1])
