"""Parse the components in model_index.json and refuse components that would run code from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
"""Vocabulary files. Every tokenizer except BYTE_TOKENIZERS needs at least one of them."""
BPE_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast")
"""Tokenizers that need tokenizer.json, or vocab.json with merges.txt."""
BYTE_TOKENIZERS = ("ByT5Tokenizer",)
"""Tokenizers without a vocabulary."""
REFUSED_KEYS = {
    **dict.fromkeys(
        ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "custom_generate"), "would run code"
    ),
    **dict.fromkeys(("use_kernels", "kernel_config"), "would fetch and run kernels"),
    "attribute_map": "renames settings, which could hide any of these keys",
    "transformers_weights": "would load unchecked weights",
    "gguf_file": "would load an unchecked tokenizer",
    "audio_tokenizer": "would load another model",
}
"""Config keys that would make a library run code or load unchecked files, each with its effect."""
ATTENTION_KEYS = ("attn_implementation", "experts_implementation")
"""Suffixes of keys whose value may name a kernel, which transformers would fetch from the Hub and run."""
ATTENTIONS = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
"""Implementations of attention and experts that torch and transformers include."""
QUANTIZERS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum"}
"""The module that contains the kernels of each quantization method. Other methods may fetch kernels from the Hub."""


def named_components(index: Mapping[str, Any], name: str) -> dict[str, tuple[str, str]]:
    """Map each component that model_index.json does not set to null to its library and class.

    Raises ModelError for an unsupported library or class.
    """
    components = {}
    for key, value in index.items():
        match value:
            case [None, *_]:
                continue
            case ["transformers", str(class_name)] if class_name.startswith("Auto"):
                raise ModelError(
                    f"{name}: {key} is of class {class_name}, which loads any class; name the component's class instead"
                )
            case [str(library), str(class_name)] if key.isidentifier() and is_library(library):
                components[key] = library, class_name
            case [*_] if not key.startswith("_"):
                raise ModelError(f"{name}: {key} is {value}: only classes of diffusers and transformers are supported")
    return components


def is_library(name: str) -> bool:
    """Return whether `name` is diffusers, transformers or one of diffusers' pipeline folders.

    For any other name, diffusers would run a Python file in the component's folder or import another package.
    """
    folder = diffusers_folder() / "pipelines" / name
    return name in COMPONENT_LIBRARIES or (name.isidentifier() and (folder / "__init__.py").is_file())


def diffusers_folder() -> Path:
    """Return the folder of the diffusers package, without importing the package."""
    spec = find_spec("diffusers")
    return Path(str(spec and spec.origin)).parent


def refuse_code(path: Path, components: Iterable[str], name: str) -> None:
    """Raise ModelError for components that would run code or load unchecked weights.

    A Python file with the name of a library would run instead of the library. transformers would run code named by
    `auto_map`, and load an adapter if peft is installed.
    """
    for component in sorted(components):
        for file in (path / component).glob("*.json"):
            if file.name == "adapter_config.json":
                raise ModelError(f"{name}: {component}/ contains an adapter; merge it into the weights, or use --lora")
            for settings in json_objects(read_json(file, name)):
                _refuse_code_keys(settings, f"{name}: {component}/{file.name}")
        for file in (path / component).glob("*.py"):
            if is_library(file.stem):
                raise ModelError(f"{name}: {component}/{file.name} is code that would run instead of {file.stem}")


def _refuse_code_keys(settings: Mapping[str, Any], source: str) -> None:
    """Raise ModelError for a setting that makes a library run code or load unchecked files."""
    for key, value in settings.items():
        if not value or type(value) is int:  # a vocabulary maps words, which may equal these keys, to ids
            continue
        if key in REFUSED_KEYS:
            raise ModelError(
                f"{source} {REFUSED_KEYS[key]} ({key}): batch-infer does not run code from a checkpoint and "
                "loads only its components"
            )
        if key == "quantization_config":
            _refuse_quantizer(value, source)
        if key.removesuffix("_internal").endswith(ATTENTION_KEYS):
            names = value.values() if isinstance(value, dict) else [value]
            if kernels := [text for text in names if text not in ATTENTIONS]:
                raise ModelError(
                    f"{source} has {key}={kernels[0]!r}, a kernel that would be fetched and run; remove the key, or "
                    "use sdpa"
                )


def _refuse_quantizer(settings: Any, source: str) -> None:
    """Raise ModelError for a quantization method that may need code from the Hub or needs a missing package."""
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(method, str) or method not in QUANTIZERS:
        raise ModelError(
            f"{source} has quant_method {method!r}, which may fetch and run code; "
            f"supported methods are {', '.join(QUANTIZERS)}. Use the unquantized checkpoint"
        )
    if find_spec(QUANTIZERS[method]) is None:
        package = "optimum-quanto" if method == "quanto" else method
        raise ModelError(f"{source} has quant_method {method!r}: pip install {package}")


def check_vocabularies(path: Path, components: Mapping[str, tuple[str, str]], name: str) -> None:
    """Raise ModelError for a tokenizer whose vocabulary is missing or incomplete.

    Without one, transformers would create an empty vocabulary and encode every prompt as the empty prompt.
    """
    for component, (_, class_name) in sorted(components.items()):
        if not component.startswith("tokenizer"):
            continue
        files = {file.name for file in (path / component).glob("*")}
        if class_name not in BYTE_TOKENIZERS and not files.intersection(VOCABULARIES):
            raise ModelError(f"{name}: {component}/ has none of {', '.join(VOCABULARIES)}; is the folder complete?")
        if class_name in BPE_TOKENIZERS and "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
            raise ModelError(f"{name}: {component}/ lacks vocab.json or merges.txt; is the folder complete?")
