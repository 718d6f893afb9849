"""The components that model_index.json names: which are read, and that none brings code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from batch_infer.errors import ModelError
from batch_infer.models.untrusted import json_objects, read_json

COMPONENT_LIBRARIES = ("diffusers", "transformers")
VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model"),
    "sentencepiece.bpe.model",
)
"""Vocabulary files, of which each tokenizer has at least one."""
BPE_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast")
"""Tokenizers whose vocab.json needs a merges.txt, unless there is a tokenizer.json."""
BYTE_TOKENIZERS = ("ByT5Tokenizer",)
"""Tokenizers without a vocabulary."""
REFUSED_KEYS = {
    **dict.fromkeys(
        ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "custom_generate"),
        "names code to load",
    ),
    **dict.fromkeys(("use_kernels", "kernel_config"), "requests kernels, which would be fetched and run"),
    "attribute_map": "renames settings, so that one of these could pass under another name",
    "transformers_weights": "names weights to load in place of those that are checked",
    "gguf_file": "names a tokenizer to load in place of the one that is checked",
    "audio_tokenizer": "names another model to load",
}
"""Keys by which a library runs code of a checkpoint or loads what is no part of it, and their effect."""
ATTENTION_KEYS = ("attn_implementation", "experts_implementation")
"""Ends of keys that can also name a kernel, which transformers fetches from the Hub and runs."""
ATTENTIONS = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""Implementations in torch and transformers themselves."""
QUANTIZERS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum"}
"""Quantization methods whose kernels are in the package of that name; kernels of others come from the Hub."""


def named_components(index: Mapping[str, Any], name: str) -> dict[str, tuple[str, str]]:
    """Return library and class by component of a model_index.json. Raises ModelError for code from anywhere else."""
    components = {}
    for key, value in index.items():
        match value:
            case [None, *_]:
                continue
            case ["transformers", str(kind)] if kind.startswith("Auto"):
                raise ModelError(f"{name}: {key} is any class that its folder names ({kind}); name the class itself")
            case [str(library), str(kind)] if key.isidentifier() and is_library(library):
                components[key] = library, kind
            case [*_] if not key.startswith("_"):
                raise ModelError(f"{name}: {key} is {value}, and only classes of diffusers and transformers are run")
    return components


def is_library(name: str) -> bool:
    """Return whether components may come from `name`: a library, or a folder of diffusers' pipelines.

    diffusers takes any other name for a Python file in the model's folder.
    """
    return name in COMPONENT_LIBRARIES or (name.isidentifier() and any(_find_pipelines(name)))


def _find_pipelines(name: str) -> Iterator[Path]:
    """Yield the folder of that name among diffusers' pipelines, without importing it."""
    spec = find_spec("diffusers")
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / "pipelines" / name / "__init__.py").is_file():
            yield Path(place) / "pipelines" / name


def refuse_code(path: Path, components: Iterable[str], name: str) -> None:
    """Raise ModelError for components that would bring code, or weights that are not checked.

    A file named like a library would be run in its place. transformers would run what `auto_map` names, and where peft
    is installed it would add an adapter to a network.
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
                raise ModelError(f"{name}: {component}/{file.name} is code, and would be run in place of {file.stem}")


def _refuse_code_keys(settings: Mapping[str, Any], place: str) -> None:
    """Raise ModelError for a setting that makes a library fetch or run code. (A number belongs to a vocabulary.)"""
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
                    f"{place} has {key}={other[0]!r}, a kernel that would be fetched and run; remove the key, or use "
                    "sdpa"
                )


def _refuse_quantizer(settings: Any, place: str) -> None:
    """Raise ModelError for weights that need code from the Hub or a missing package."""
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(method, str) or method not in QUANTIZERS:
        raise ModelError(
            f"{place} has quant_method {method!r}, which may fetch and run code; "
            f"methods that can be loaded are {', '.join(QUANTIZERS)}. Use the checkpoint that is not quantized"
        )
    if find_spec(QUANTIZERS[method]) is None:
        package = "optimum-quanto" if method == "quanto" else method
        raise ModelError(f"{place} has quant_method {method!r}: pip install {package}")


def check_vocabularies(path: Path, components: Mapping[str, tuple[str, str]], name: str) -> None:
    """Raise ModelError for a tokenizer without a vocabulary.

    transformers would make one without a word in it, and every prompt would be the empty one.
    """
    for component, (_, kind) in sorted(components.items()):
        if not component.startswith("tokenizer"):
            continue
        files = {file.name for file in (path / component).glob("*")}
        if kind not in BYTE_TOKENIZERS and not files.intersection(VOCABULARIES):
            raise ModelError(f"{name}: {component}/ holds none of {', '.join(VOCABULARIES)}; is the folder complete?")
        if kind in BPE_TOKENIZERS and "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
            raise ModelError(f"{name}: {component}/ lacks vocab.json or merges.txt; is the folder complete?")
