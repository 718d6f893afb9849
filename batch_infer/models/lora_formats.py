"""Convert LoRA files of all formats that diffusers knows to the names of peft, and account for each of their tensors.

diffusers ignores magnitudes in kohya's format, applies some alphas to the wrong layers, and drops some tensors that it
does not know. Therefore alphas and magnitudes are assigned to layers here, and diffusers only converts the other
tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from safetensors import safe_open
from transformers import PreTrainedModel

from batch_infer.records import Lora

Tensors = dict[str, torch.Tensor]

ALPHA = ".alpha"
MAGNITUDES = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
"""Suffixes of the magnitudes of DoRA in the formats of kohya and peft."""
CONFIGS = "lora_adapter_metadata"
"""Key of a file's metadata in which diffusers stores the configs of peft, with the network as prefix of each option."""
UNSUPPORTED_OPTIONS = ("layer_replication", "modules_to_save", "alora_invocation_tokens", "use_qalora", "arrow_config")
"""Options of peft that would change the result."""
_DOWN = re.compile(r"(?:[._]lora(?:_linear_layer)?\.down|\.lora_down|\.lora_A(?:\.default)?)\.weight$")
_PEFT_NAME = re.compile(r"(.+)\.lora_(?:A\.weight|B\.weight|B\.bias|magnitude_vector)")


@dataclass(frozen=True, slots=True)
class Adapter:
    """The tensors of a LoRA by component and peft name, and the alphas by component and layer.

    A layer without an alpha has its rank as alpha.
    """

    tensors: Mapping[str, Tensors]
    alphas: Mapping[tuple[str, str], float]

    @property
    def layers(self) -> dict[tuple[str, str], Tensors]:
        """The tensors of each layer by component and layer, named `lora_A.weight` and so on."""
        layers: dict[tuple[str, str], Tensors] = {}
        for component, tensors in self.tensors.items():
            for name, tensor in tensors.items():
                layer = layer_of(name)
                layers.setdefault((component, layer), {})[name[len(layer) + 1 :]] = tensor
        return layers

    def alpha_of(self, component: str, layer: str) -> float:
        return self.alphas.get((component, layer), len(self.tensors[component][f"{layer}.lora_A.weight"]))


def layer_of(name: str) -> str:
    """Return the layer of a tensor's peft name. Raises ValueError for the name of another kind of tensor."""
    match = _PEFT_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is not a tensor of a LoRA")
    return match[1]


def read_adapter(pipeline: Any, lora: Lora) -> Adapter:
    """Read a LoRA file and convert it for a pipeline.

    Raises ValueError if a tensor has no place in the pipeline, and other LOADING_ERRORS of diffusers and safetensors.
    """
    with safe_open(lora.path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        configs = json.loads((file.metadata() or {}).get(CONFIGS, "{}"))
    alphas = {name.removesuffix(ALPHA): tensors.pop(name).item() for name in list(tensors) if name.endswith(ALPHA)}
    magnitudes = {
        name[: -len(suffix)]: (name, tensors.pop(name))
        for name in list(tensors)
        for suffix in MAGNITUDES
        if name.endswith(suffix)
    }
    downs = {_DOWN.sub("", name): name for name in tensors if _DOWN.search(name)}
    if unmatched := sorted((alphas.keys() | magnitudes.keys()) - downs.keys()):
        raise ValueError(f"{unmatched[0]} has an alpha or a magnitude, but no LoRA")
    # With alphas equal to the ranks, converters that apply alphas do not change the tensors.
    ranks = {f"{layer}{ALPHA}": torch.tensor(float(len(tensors[downs[layer]]))) for layer in alphas}
    converted, sources = _convert(pipeline, tensors, ranks)
    targets: dict[str, list[tuple[str, str]]] = {}
    for component, part in converted.items():
        for name, tensor in part.items():
            for source in sources[id(tensor)]:
                targets.setdefault(source, []).append((component, layer_of(name)))
    for layer, magnitude in magnitudes.items():
        if len(targets[downs[layer]]) > 1:
            raise ValueError(f"{layer} is a fused layer of a DoRA, which diffusers splits without its magnitude")
        component, name = targets[downs[layer]][0]
        converted[component][f"{name}.lora_magnitude_vector"] = _shape_magnitude(*magnitude, tensors[downs[layer]])
    adapter = Adapter(converted, {target: alpha for layer, alpha in alphas.items() for target in targets[downs[layer]]})
    return _apply_configs(adapter, configs) if configs else adapter


def _convert(pipeline: Any, tensors: Tensors, alphas: Tensors) -> tuple[dict[str, Tensors], dict[int, set[str]]]:
    """Return the tensors by component and peft name, and the names of the source tensors of each, by its id.

    torch records the sources, as it does for gradients. Raises ValueError if a tensor is not used.
    """
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    names = {id(leaf): name for name, leaf in leaves.items()}
    options = {"unet_config": pipeline.unet.config} if isinstance(pipeline, StableDiffusionXLLoraLoaderMixin) else {}
    with torch.enable_grad():
        # Converters may change tensors in place, which torch allows for copies only.
        output = pipeline.lora_state_dict(
            {**{name: leaf.clone() for name, leaf in leaves.items()}, **alphas}, **options
        )
    converted: Tensors = output[0] if isinstance(output, tuple) else output
    sources = {id(tensor): {names[leaf] for leaf in _find_leaves(tensor)} for tensor in converted.values()}
    if unused := sorted(tensors.keys() - set().union(*sources.values())):
        raise ValueError(f"{len(unused)} of its {len(tensors)} tensors match no layer: {unused[0]}")
    return _to_peft(pipeline, converted), sources


def _find_leaves(tensor: torch.Tensor) -> set[int]:
    """Return the ids of the tensors from which a tensor was computed."""
    leaves, seen, nodes = set[int](), set[Any](), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [parent for parent, _ in node.next_functions]
    return leaves


def _to_peft(pipeline: Any, converted: Tensors) -> dict[str, Tensors]:
    """Group tensors by component and rename them as in peft. Raises ValueError if the pipeline lacks a component."""
    components: dict[str, Tensors] = {}
    for name, tensor in converted.items():
        component, _, rest = name.partition(".")
        components.setdefault(component, {})[rest] = tensor
    for component, tensors in components.items():
        network = getattr(pipeline, component, None) if component in pipeline._lora_loadable_modules else None
        if network is None:
            raise ValueError(f"{type(pipeline).__name__} has no {component} that can have a LoRA")
        if not all(map(_PEFT_NAME.fullmatch, tensors)):
            if isinstance(network, PreTrainedModel):
                for names in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):  # a file may have both
                    tensors = convert_state_dict_to_peft(tensors, original_type=names)
            else:
                tensors = convert_unet_state_dict_to_peft(tensors)
        if isinstance(network, PreTrainedModel) and not hasattr(network, "text_model"):  # the name in earlier versions
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        components[component] = tensors
    return components


def _shape_magnitude(name: str, magnitude: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return the magnitudes of a layer's outputs in peft's shape. Raises ValueError for magnitudes of its inputs.

    kohya's format has the shape (outputs, 1, ...), or (1, inputs, ...) for magnitudes of inputs. peft's has the shape
    (outputs,), or (1, outputs, 1, 1) for a convolution.
    """
    is_convolution_of_peft = magnitude.ndim > 2 and not name.endswith(MAGNITUDES[0])
    if magnitude.ndim == 0 or magnitude.numel() != magnitude.shape[1 if is_convolution_of_peft else 0]:
        raise ValueError(f"{name} is not a magnitude for each output: its shape is {list(magnitude.shape)}")
    return magnitude.reshape(1, -1, *[1] * (down.ndim - 2)) if down.ndim > 2 else magnitude.flatten()


def _apply_configs(adapter: Adapter, configs: Mapping[str, Any]) -> Adapter:
    """Return the adapter with the alphas of peft's configs. Raises ValueError for an unsupported config."""
    from peft.utils.other import get_pattern_key

    if adapter.alphas:
        raise ValueError("its alphas are both in tensors and in its metadata")
    alphas = {}
    for (component, layer), tensors in adapter.layers.items():
        config: dict[str, Any] = {
            key.removeprefix(f"{component}."): configs[key] for key in configs if key.startswith(f"{component}.")
        }
        if unsupported := [option for option in UNSUPPORTED_OPTIONS if config.get(option)]:
            raise ValueError(f"its metadata sets {unsupported[0]}, which is not supported")
        if "lora_alpha" not in config:
            continue
        patterns: dict[str, float] = config.get("alpha_pattern") or {}
        alpha = float(patterns.get(get_pattern_key(list(patterns), layer), config["lora_alpha"]))
        rank = len(tensors["lora_A.weight"])
        alphas[component, layer] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return Adapter(adapter.tensors, alphas)
