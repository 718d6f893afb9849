"""The components that a model_index.json names: which of them are read, and that none brings code of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.untrusted import json_objects, read_json

LIBRARIES = ("diffusers", "transformers")
WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
"""Files that hold a tokenizer's words, of which each tokenizer has some."""
MERGING = ("CLIPTokenizer", "CLIPTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast")
"""Tokenizers whose vocab.json needs a merges.txt, unless there is a tokenizer.json."""
REFUSED_KEYS = {
    **dict.fromkeys(
        ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "custom_generate"),
        "names code to load",
    ),
    **dict.fromkeys(("use_kernels", "kernel_config"), "asks for kernels, which would be fetched and run"),
    "attribute_map": "renames settings, so that one of these could pass under another name",
    "transformers_weights": "names weights to load in place of those that are checked",
    "gguf_file": "names a tokenizer to load in place of the one that is checked",
    "audio_tokenizer": "names another model to load",
}
"""Keys by which a library runs code of a checkpoint, or loads what is no part of it, and what each does."""
ATTENTION_KEYS = ("attn_implementation", "experts_implementation")
"""Ends of keys under which transformers takes the name of a kernel too, which it fetches from the Hub and runs."""
ATTENTIONS = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""Implementations that torch and transformers bring."""
QUANTIZERS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum"}
"""Methods of quantization whose kernels are in the package of that name; for others the Hub's are fetched and run."""
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
            for settings in json_objects(read_json(file, name)):
                _refuse_code_keys(settings, f"{name}: {component}/{file.name}")
        for file in (path / component).glob("*.py"):
            if is_library(file.stem):
                raise ModelError(f"{name}: {component}/{file.name} is code, and would be run for {file.stem}'s")


def _refuse_code_keys(settings: Mapping[str, Any], place: str) -> None:
    """Raises ModelError for a setting that makes a library fetch or run code. (A number is a word of a vocabulary.)"""
    for key, value in settings.items():
        if not value or type(value) is int:
            continue
        if key in REFUSED_KEYS:
            raise ModelError(
                f"{place} {REFUSED_KEYS[key]} ({key}): batch-infer does not run code from a checkpoint and "
                "loads only its components"
            )
        if key == "quantization_config":
            _refuse_quantizer(value, place)
        if key.removesuffix("_internal").endswith(ATTENTION_KEYS):
            names = value.values() if isinstance(value, dict) else [value]
            if other := [text for text in names if text not in ATTENTIONS]:
                raise ModelError(
                    f"{place} has {key}={other[0]!r}, a kernel that would be fetched and run; remove the key, or give "
                    "sdpa"
                )


def _refuse_quantizer(settings: Any, place: str) -> None:
    """Raises ModelError for weights that a library could read only with code from the Hub or a missing package."""
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(method, str) or method not in QUANTIZERS:
        raise ModelError(
            f"{place} has quant_method {method!r}, which may fetch and run code; "
            f"methods that can be loaded are {', '.join(QUANTIZERS)}. Use the checkpoint that is not quantized"
        )
    if find_spec(QUANTIZERS[method]) is None:
        package = "optimum-quanto" if method == "quanto" else method
        raise ModelError(f"{place} has quant_method {method!r}: pip install {package}")


def refuse_no_words(path: Path, components: Mapping[str, tuple[str, str]], name: str) -> None:
    """Raises ModelError for a tokenizer that holds no words.

    transformers would make one without a word in it, and every prompt would be the empty one.
    """
    for component, (_, kind) in sorted(components.items()):
        if not component.startswith("tokenizer"):
            continue
        held = {file.name for file in (path / component).glob("*")}
        if kind not in WORDLESS and not held.intersection(WORDS):
            raise ModelError(f"{name}: {component}/ holds none of {', '.join(WORDS)}; is the folder complete?")
        if kind in MERGING and "tokenizer.json" not in held and not {"vocab.json", "merges.txt"} <= held:
            raise ModelError(f"{name}: {component}/ lacks vocab.json or merges.txt; is the folder complete?")
