"""Read and check the files of an untrusted checkpoint.

Weights are read only from safetensors files, because unpickling a file runs any code in it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from batch_infer.errors import ModelError, first_line

MAX_DEPTH = 64
"""Maximum nesting of a JSON file. Libraries copy and print it recursively, and could exceed the recursion limit."""
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
CONFIG_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Suffixes of configs and vocabularies. Of a component's other files, only weights are read."""
LFS_POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer, a text file that stands in for weights until they are downloaded."""
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
"""Errors that diffusers, transformers and torch raise for invalid files."""
LIBRARIES = ("accelerate", "diffusers", "huggingface_hub", "safetensors", "tokenizers", "transformers")
"""Packages whose own error classes count as loading errors."""

File = TypeVar("File", bound=PurePath)


@contextmanager
def loading_errors(source: object) -> Iterator[None]:
    """Re-raise library errors as ModelError naming `source`, such as a folder or file.

    Device errors propagate unchanged, because the checkpoint does not cause them.
    """
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        # tokenizers raises plain Exceptions.
        is_library_error = isinstance(error, LOADING_ERRORS) or package in LIBRARIES or type(error) is Exception
        if not is_library_error or _is_device_error(error):
            raise
        raise ModelError(f"{source} could not be loaded: {describe(error)}") from error


def describe(error: Exception) -> str:
    """Format a library's error as one line, with its type if the message alone is unclear, such as a KeyError's."""
    line = first_line(error)
    if line.endswith(":"):
        line = " ".join(part.strip() for part in str(error).strip().splitlines()[:2])
    is_clear = isinstance(error, (OSError, ValueError, TypeError, SafetensorError)) or type(error) is RuntimeError
    name = type(error).__name__
    return line if is_clear or line == name else f"{name}: {line}"


def _is_device_error(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from batch_infer.accelerator import is_device_error

    return isinstance(error, RuntimeError) and is_device_error(error)


def parse_json(content: bytes, source: object) -> Any:
    """Parse the bytes of a JSON file. Raises ModelError naming `source` for invalid JSON and deep nesting."""
    try:
        document = json.loads(content.decode("utf-8"))
        is_too_deep = sum(1 for _ in _levels(document)) > MAX_DEPTH
    except RecursionError:
        is_too_deep = True
    except ValueError as error:
        raise ModelError(f"{source} is not JSON: {error}") from error
    if is_too_deep:
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
        raise ModelError(f"{name}: {path} is not a JSON object")
    return document


def _has_variant(file: PurePath, variant: str | None) -> bool:
    """Return whether a file has weights of a variant, as in `model.fp16.safetensors`, or default weights for None."""
    _, *infixes = file.name.removesuffix(".safetensors").split(".")
    file_variant = infixes[0].split("-")[0] if infixes else None
    return file.suffix == ".safetensors" and file_variant == variant


def choose_variant(files: Iterable[PurePath], variant: str | None) -> str | None:
    """Return `variant` if a component's files include weights of that variant, else None for the default weights."""
    return variant if variant and any(_has_variant(file, variant) for file in files) else None


def choose_weights(files: Iterable[File], variant: str | None) -> list[File]:
    """Return the weight files to load among a component's files, sorted by name."""
    files = sorted(files)
    chosen = choose_variant(files, variant)
    return [file for file in files if _has_variant(file, chosen)]


def check_weights(path: Path, components: Iterable[str], name: str, variant: str | None) -> None:
    """Check that components have folders, that any weights are complete safetensors, and that `variant` exists.

    Raises ModelError.
    """
    has_variant = False
    for component in sorted(components):
        folder = path / component
        if not folder.is_dir():
            raise ModelError(f"{name}: model_index.json names {component}/, which is missing; is the folder complete?")
        files = list(folder.iterdir())
        refuse_pickles(component, files, name)
        weights, chosen = choose_weights(files, variant), choose_variant(files, variant)
        has_variant |= chosen is not None
        for file in (*weights, *_list_shards(folder, chosen)):
            read_shapes(file, f"{name}: {component}/{file.name}")
        others = sorted(file.name for file in files if file.suffix == ".safetensors")
        if others and not weights:
            raise ModelError(f"{name}: {component}/ has only weights of a variant ({others[0]}): set --variant")
    if variant and not has_variant:
        raise ModelError(f"{name} has no weights of variant {variant}")


def refuse_pickles(component: str, files: Collection[PurePath], name: str) -> None:
    """Raise ModelError if a component has only pickled weights."""
    pickles = sorted(file.name for file in files if file.suffix in PICKLE_SUFFIXES)
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(
            f"{name}: {component}/{pickles[0]} is pickled, and reading a pickle can run code; "
            "convert the checkpoint to safetensors (save_pretrained does)"
        )


def _list_shards(folder: Path, variant: str | None) -> Iterator[Path]:
    """Yield the weight files that a component's index names, even missing ones. Raises ModelError."""
    infix = f".{variant}" if variant else ""
    for index in folder.glob(f"*.safetensors.index{infix}.json"):
        try:
            for file in sorted(set(read_object(index, folder.name)["weight_map"].values())):
                if Path(file).name != file or not _has_variant(Path(file), variant):
                    raise ModelError(f"{index} names {file}, which is not a shard of this component's weights")
                yield folder / file
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not an index of weights: {error}") from error


def hash_files(path: Path, components: Iterable[str], variant: str | None) -> str:
    """Return a digest of the names and bytes of the components' configs, vocabularies and weights to load.

    Raises ModelError.
    """
    hasher = hashlib.sha256()
    for component in sorted(components):
        files = sorted((path / component).glob("*"))
        weights = choose_weights(files, variant)
        for file in files:
            if file.suffix in CONFIG_SUFFIXES or file in weights:
                hasher.update(f"{component}/{file.name}\0".encode())
                _hash(hasher, file)
    return hasher.hexdigest()[:32]


def hash_file(file: Path) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 digest of a file's bytes. Raises ModelError."""
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


def read_shapes(file: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Map each tensor name of a safetensors file to the tensor's shape. Raises ModelError, which calls the file `name`.

    The safetensors library checks the header, each shape and offset, and that the file ends with the last tensor.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(f"{name} is a Git LFS pointer: download the weights with `git lfs pull`")
        with safe_open(file, framework="np") as tensors:
            keys = tensors.keys()
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in keys}
    except FileNotFoundError:
        raise ModelError(f"{name} is missing; is the folder complete?") from None
    except OSError as error:
        raise ModelError(f"{name} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelError(f"{name} is damaged or incomplete; download it again ({error})") from error
