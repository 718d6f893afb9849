"""Fuse LoRAs into the weights of a loaded pipeline with diffusers and peft, for all rows or for some."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from batch_infer.accelerator import is_device_error, synchronize
from batch_infer.errors import FailedRowError, ModelError, RowError, first_line
from batch_infer.models.lora_formats import Adapter, layer_of, read_adapter
from batch_infer.models.untrusted import LOADING_ERRORS, describe, hash_file
from batch_infer.records import Lora

ADAPTER = "lora"
MODEL = "the model"
"""Name of the model in messages for single rows."""
FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""Layers that diffusers makes of others to compute their outputs at once."""

# Mute the log message on why a LoRA does not fit, because diffusers also raises an error with the same text.
logging.getLogger("diffusers.loaders.peft").setLevel(logging.CRITICAL)


class RowLoras:
    """Fuses the LoRA of a group of rows into the weights of a pipeline, and restores the weights for other rows.

    The weights are restored from copies on the CPU, so that rows do not depend on the LoRAs of earlier rows.
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._pipeline, self._device = pipeline, device
        self._current: Lora | None = None
        self._are_weights_valid = True
        """Whether the weights are exactly those of `_current`: not while switching, or after restoring them failed."""
        self._originals: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def is_in_use(self, lora: Lora | None) -> bool:
        """Return whether the weights contain exactly this LoRA, or no LoRA for None."""
        return self._are_weights_valid and lora == self._current

    @torch.no_grad()
    def use(self, lora: Lora | None) -> None:
        """Switch to a LoRA, or to none.

        Raises RowError if it does not fit, and FailedRowError if its file was changed or removed. After an error, the
        weights are the original ones, unless restoring them failed. The next call then restores them.
        """
        self._are_weights_valid = False
        self._restore()
        if lora is not None:
            try:
                _check_unchanged(lora)
                adapter = _read(self._pipeline, lora, MODEL)
                weights = list(_list_weights(self._pipeline, adapter))
                self._originals = [(weight, torch.clone(weight.detach()).cpu()) for weight in weights]
                _fuse(self._pipeline, lora, adapter, MODEL)
                for weight, original in self._originals:  # peft may change the memory format, which affects speed
                    if weight.stride() != original.stride():
                        weight.data = torch.empty_like(original, device=weight.device).copy_(weight)
            except BaseException as error:
                self._restore()
                self._finish()
                self._are_weights_valid = True
                if isinstance(error, ModelError):
                    raise RowError(str(error)) from error
                raise
            self._current = lora
        self._finish()
        self._are_weights_valid = True

    def _restore(self) -> None:
        for weight, original in self._originals:
            weight.copy_(original)
        self._originals, self._current = [], None

    def _finish(self) -> None:
        """Copy weights to fused projections, which networks on a GPU use, and wait for the copies."""
        for network in self._pipeline.components.values():
            for module in network.modules() if isinstance(network, torch.nn.Module) else ():
                if getattr(module, "fused_projections", False):
                    _refresh_projections(module)
        synchronize(self._device)


def _check_unchanged(lora: Lora) -> None:
    """Raise FailedRowError if a file is not the one that the command has read."""
    try:
        is_same = hash_file(lora.path) == lora.fingerprint
    except ModelError as error:
        raise FailedRowError(str(error)) from error
    if not is_same:
        raise FailedRowError(f"{lora.path} was changed after the run had started")


def fuse_lora(pipeline: Any, lora: Lora, model: str) -> None:
    """Fuse a LoRA into the weights of a loaded pipeline.

    Raises ModelError if the LoRA cannot be loaded, does not fit or makes weights non-finite.
    """
    _fuse(pipeline, lora, _read(pipeline, lora, model), model)


def _read(pipeline: Any, lora: Lora, model: str) -> Adapter:
    """Read and convert a LoRA file, and compare its shapes with the layers. Raises ModelError if it does not fit."""
    try:
        adapter = read_adapter(pipeline, lora)
        for (component, layer), tensors in adapter.layers.items():
            _check_layer(getattr(pipeline, component), layer, tensors)
    except LOADING_ERRORS as error:
        _raise_device_error(error)
        raise _misfit(lora, model, describe(error)) from error
    for tensors in adapter.tensors.values():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ModelError(f"{lora.path} cannot be added to {model}: NaN or infinity in {name}")
    return adapter


def _raise_device_error(error: Exception) -> None:
    """Raise an error that the LoRA did not cause, such as a lack of memory."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_device_error(error)):
        raise error


def _misfit(lora: Lora, model: str, reason: str) -> ModelError:
    return ModelError(f"{lora.path} does not fit {model}; was it made for another family? ({reason})")


def _check_layer(network: Any, layer: str, tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError or AttributeError if the tensors of a layer are incomplete, or do not fit the network's."""
    weight = network.get_submodule(layer).weight
    down, up = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
    if down is None or up is None:
        raise ValueError(f"{layer} has only half of a LoRA")
    shape = (len(up), *down.shape[1:])
    if shape != tuple(weight.shape) or tuple(up.shape[1:]) != (len(down), *[1] * (weight.ndim - 2)):
        shapes = f"{list(up.shape)} and {list(down.shape)}"
        raise ValueError(
            f"the shapes {shapes} of {layer} do not fit its weight, which has the shape {list(weight.shape)}"
        )


def _list_weights(pipeline: Any, adapter: Adapter) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters that a LoRA changes."""
    for (component, layer), tensors in adapter.layers.items():
        module = getattr(pipeline, component).get_submodule(layer)
        yield module.weight
        if "lora_B.bias" in tensors and module.bias is not None:
            yield module.bias


def _fuse(pipeline: Any, lora: Lora, adapter: Adapter, model: str) -> None:
    """Fuse the tensors of a LoRA with diffusers and peft. Raises ModelError.

    diffusers silently drops tensors that do not match the model, so the loaded ones are compared with the file's.
    """
    try:
        pipeline.load_lora_weights(_name_tensors(pipeline, adapter), adapter_name=ADAPTER)
        if unloaded := _find_unloaded(pipeline, adapter):
            raise _misfit(lora, model, f"diffusers does not load {unloaded}")
        pipeline.set_adapters(ADAPTER, lora.weight)
        _set_scales(pipeline, adapter, lora.weight)
        pipeline.fuse_lora(components=list(adapter.tensors), safe_fusing=True)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{lora.path} cannot be added to {model}: {first_line(error)}") from error
    except LOADING_ERRORS as error:
        _raise_device_error(error)
        raise _misfit(lora, model, describe(error)) from error
    finally:
        pipeline.unload_lora_weights()


def _name_tensors(pipeline: Any, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Name the tensors as diffusers and, for its networks, transformers load them."""
    named = {}
    for component, tensors in adapter.tensors.items():
        is_of_transformers = isinstance(getattr(pipeline, component), PreTrainedModel)
        for name, tensor in tensors.items():
            suffix = ".weight" if is_of_transformers and name.endswith("lora_magnitude_vector") else ""
            named[f"{component}.{name}{suffix}"] = tensor
    return named


def _find_unloaded(pipeline: Any, adapter: Adapter) -> str | None:
    """Return the name of a tensor that was not loaded unchanged, or of a layer with more tensors, else None."""
    for component, tensors in adapter.tensors.items():
        loaded = {
            name: weight for name, weight in getattr(pipeline, component).named_parameters() if f".{ADAPTER}." in name
        }
        for name, tensor in tensors.items():
            layer = layer_of(name)
            part, _, kind = name[len(layer) + 1 :].partition(".")
            weight = loaded.pop(f"{layer}.{part}.{ADAPTER}.{kind or 'weight'}", None)
            if weight is None or not torch.equal(weight, tensor.to(weight)):
                return f"{component}.{name}"
        if loaded:
            return f"{component}.{min(loaded)}"
    return None


def _set_scales(pipeline: Any, adapter: Adapter, weight: float) -> None:
    """Set the scale of each layer, because diffusers may assign a layer's alpha or rank to other layers."""
    for (component, layer), tensors in adapter.layers.items():
        module = getattr(pipeline, component).get_submodule(layer)
        module.scaling[ADAPTER] = weight * adapter.alpha_of(component, layer) / len(tensors["lora_A.weight"])


def _refresh_projections(attention: Any) -> None:
    """Copy the weights of projections to the projections that `fuse_qkv_projections` of diffusers made of them."""
    for fused, parts in FUSED_PROJECTIONS.items():
        for kind in ("weight", "bias"):
            target = getattr(getattr(attention, fused, None), kind, None)
            if target is not None:
                target.copy_(torch.cat([getattr(getattr(attention, part), kind) for part in parts]))
