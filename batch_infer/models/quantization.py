"""Quantize the weights of linear layers to 8 or 4 bits with torchao or bitsandbytes, the extra `quantize`.

fp8 is float8_e4m3fn and int8 is symmetric, both with one scale per output channel. nf4 is 4-bit NormalFloat (Dettmers
et al., arXiv 2305.14314) with one scale per 64 weights. Inputs, products and sums keep the model's dtype: a layer
restores its weight before it multiplies.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from batch_infer.errors import ModelError
from batch_infer.models.families import CHECKER_COMPONENTS
from batch_infer.models.startup import allow_quantization_libraries
from batch_infer.settings import Quantization

NF4_BLOCK = 64
"""Number of weights that share a scale in nf4. A layer whose input width is not a multiple of it is not quantized."""
PRECISE_LAYERS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
"""Attributes in which diffusers and transformers name the layers that must not be quantized, such as T5's `wo`."""

# torch.compile advises the authors of torchao on its cache.
warnings.filterwarnings("ignore", ".* does not implement _stable_hash_for_caching", UserWarning)


def quantize(components: Mapping[str, Any], kind: Quantization, model: str) -> None:
    """Quantize the linear layers of a pipeline's denoisers and text encoders in place.

    The VAE and the safety checker keep their weights, as do layers that their library keeps precise. Raises ModelError
    if no layer is left.
    """
    networks = {
        id(network): network
        for name, network in components.items()
        # Of all networks of a pipeline, only a VAE has `decode`.
        if isinstance(network, nn.Module) and not hasattr(network, "decode") and name not in CHECKER_COMPONENTS
    }
    layers = {(network, name) for network in networks.values() for name in _find_layers(network, kind)}
    if not layers:
        raise ModelError(f"{model} has no layer that --quantize {kind} can quantize")
    allow_quantization_libraries()
    if kind == "nf4":
        _quantize_to_nf4(layers)
        return
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    # The other settings of torch.compile that torchao recommends choose kernels by timing.
    config = (Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig)(set_inductor_config=False)
    for network in networks.values():
        quantize_(network, config, filter_fn=lambda _, name, network=network: (network, name) in layers)


def is_quantized(network: nn.Module) -> bool:
    """Return whether any layer of a network has a quantized weight."""
    return any(len(_parts_of(weight)) > 1 for weight in network.parameters())


def count_weight_bytes(components: Iterable[Any]) -> int:
    """Return the bytes of the weights of all networks among `components`, including scales of quantized weights."""
    networks = nn.ModuleList(component for component in components if isinstance(component, nn.Module))
    return sum(part.nbytes for weight in networks.parameters() for part in _parts_of(weight))


def _parts_of(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors that make up a weight: itself, or the quantized values, their scales and code."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return weight, state.absmax, state.code
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return tuple(getattr(weight, name) for name in names)
    return (weight,)


def _find_layers(network: nn.Module, kind: Quantization) -> Iterator[str]:
    """Yield the names of the layers to quantize.

    Subclasses of nn.Linear are left out, because the modules that contain them may read their weight.
    """
    precise = [f".{name}." for module in network.modules() for key in PRECISE_LAYERS
               for name in getattr(module, key, None) or ()]  # fmt: skip
    find_output: Any = getattr(network, "get_output_embeddings", lambda: None)
    output = find_output()  # may share its weight with the input embeddings, and pipelines do not call it
    for name, layer in network.named_modules():
        fits = type(layer) is nn.Linear and (kind != "nf4" or layer.in_features % NF4_BLOCK == 0)
        if fits and layer is not output and not any(part in f".{name}." for part in precise):
            yield name


def _quantize_to_nf4(layers: Iterable[tuple[nn.Module, str]]) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for network, name in layers:
        layer: Any = network.get_submodule(name)
        weight = layer.weight.data
        options: Any = {"quant_type": "nf4", "compress_statistics": False}
        # On the meta device, the new layer needs no memory for a weight that is replaced at once.
        new: Any = Linear4bit(*weight.shape[::-1], compute_dtype=weight.dtype, device="meta", **options)
        new.bias = layer.bias
        new.weight = Params4bit(weight, requires_grad=False, module=new, **options).to(weight.device)
        # The kernel for CPUs with AVX512-BF16 would compute in bfloat16 instead of the model's dtype.
        new.support_avx512bf16_for_cpu = False
        network.set_submodule(name, new.train(layer.training))
