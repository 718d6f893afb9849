"""Reading what a checkpoint brings: JSON of bounded depth, and the one border for what libraries raise on the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from batch_infer.errors import ModelError, first_line

MAX_DEPTH = 64
"""Levels of nesting that a JSON file may have; libraries copy and print what they read by recursion."""
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
"""What diffusers, transformers and torch raise for a folder that does not hold what it says."""
LIBRARIES = ("accelerate", "diffusers", "huggingface_hub", "safetensors", "tokenizers", "transformers")
"""Packages whose own errors, where they are none of these, mean the same."""


class LoadingErrors:
    """Context manager that turns what a library raises into a ModelError naming `place`, a folder or file.

    Errors of the device are re-raised as they are: they say nothing about the checkpoint.
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
        is_library_error |= kind is Exception  # which is what tokenizers raises
        if isinstance(error, Exception) and is_library_error and not _is_from_device(error):
            raise ModelError(f"{self._place} could not be loaded: {describe(error)}") from error


def describe(error: Exception) -> str:
    """Format a library's error in one line; with its type where the text alone says little, as a KeyError's does."""
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
    """Parse a JSON file's bytes. Raises ModelError, naming `place`, for what is not JSON or is nested too deeply."""
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
    """Yield every object in a parsed JSON document, the outer ones first."""
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
    """Read a JSON file of the checkpoint `name`. Raises ModelError."""
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
