"""The components that a model_index.json names: which of them are read, and that none brings code of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError

LIBRARIES = ("diffusers", "transformers")
WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
"""Files that hold a tokenizer's words, of which each tokenizer has some."""
WORDLESS = ("ByT5Tokenizer",)
"""Tokenizers whose words are bytes."""


def named_components(index: Mapping[str, Any], name: str) -> dict[str, tuple[str, str]]:
    """Library and class by component. Raises ModelError for one that would be code from anywhere else."""
    found = {}
    for key, value in index.items():
        match value:
            case [None, *_]:
                continue
            case ["transformers", str(kind)] if kind.startswith("Auto"):
                raise ModelError(f"{name}: {key} is any class that its folder names ({kind}); name the class itself")
            case [str(library), str(kind)] if key.isidentifier() and is_library(library):
                found[key] = library, kind
            case [*_] if not key.startswith("_"):
                raise ModelError(f"{name}: {key} is {value}, and only classes of diffusers and transformers are run")
    return found


def is_library(name: str) -> bool:
    """Whether components come from there: a library, or a folder of diffusers' pipelines that has classes of its own.

    diffusers takes any other name for a Python file in the model's folder.
    """
    return name in LIBRARIES or (name.isidentifier() and any(_pipelines(name)))


def _pipelines(name: str) -> Iterator[Path]:
    """The folder of that name among diffusers' pipelines, found without importing it."""
    spec = find_spec("diffusers")
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / "pipelines" / name / "__init__.py").is_file():
            yield Path(place) / "pipelines" / name


def refuse_code(path: Path, components: Iterable[str], name: str) -> None:
    """Raises ModelError for what would bring code, or weights that nobody sees.

    A file that bears a library's name would be run in its place; transformers would run what `auto_map` names, and add
    an adapter to a network where peft is installed.
    """
    for component in sorted(components):
        for file in (path / component).glob("*.json"):
            if file.name == "adapter_config.json":
                raise ModelError(
                    f"{name}: {component}/ holds an adapter; merge it into the weights, or give it with --lora"
                )
            if b'"auto_map"' in file.read_bytes():
                raise ModelError(f"{name}: {component}/{file.name} names code of its own (auto_map), and none is run")
        for file in (path / component).glob("*.py"):
            if is_library(file.stem):
                raise ModelError(f"{name}: {component}/{file.name} is code, and would be run for {file.stem}'s")


def refuse_no_words(path: Path, components: Mapping[str, tuple[str, str]], name: str) -> None:
    """Raises ModelError for a tokenizer that holds no words.

    transformers would make one without a word in it, and every prompt would be the empty one.
    """
    for component, (_, kind) in sorted(components.items()):
        wordless = kind in WORDLESS or any((path / component / file).is_file() for file in WORDS)
        if component.startswith("tokenizer") and not wordless:
            raise ModelError(f"{name}: {component}/ holds none of {', '.join(WORDS)}; is the folder complete?")
