"""Make the calls of a denoiser equally long for texts of any length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from batch_infer.accelerator import is_device_error
from batch_infer.stacking.networks import Network
from batch_infer.stacking.plan import TextPadding
from batch_infer.stacking.trees import BatchAxes, find_tensor

PADDING_TOLERANCE = 1e-4
"""Maximum difference that masked padding may make in float32, relative to the largest value of the result."""
PADDING_ERRORS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError)


@torch.no_grad()
def find_padding(network: Network, short: Mapping[str, Any], long: Mapping[str, Any]) -> TextPadding | None:
    """Return the padding with which a denoiser computes the same for a short text as without, or None.

    `short` and `long` are the arguments of its calls for a short text, and for one of maximal length.
    """
    axes = {name: axis for name in short if (axis := _find_longer_axis(short[name], long.get(name))) is not None}
    text = next((name for name in axes if short[name].ndim == 3), None)
    if text is None:
        return None
    length = long[text].shape[axes[text]]
    masks = [name for name in network.parameters if "mask" in name and name not in axes]
    # Without any mask, a network would take the padding for text.
    for mask in masks if not any("mask" in name for name in axes) else [None]:
        padding = TextPadding(text, axes, mask, length)
        if _has_no_effect(network, padding, short):
            return padding
    return None


def _find_longer_axis(short: Any, long: Any) -> int | None:
    """Return the only axis along which `long` is longer."""
    if not isinstance(short, torch.Tensor) or not isinstance(long, torch.Tensor) or short.ndim != long.ndim:
        return None
    longer = [axis for axis in range(short.ndim) if short.shape[axis] < long.shape[axis]]
    return longer[0] if len(longer) == 1 else None


def _has_no_effect(network: Network, padding: TextPadding, arguments: Mapping[str, Any]) -> bool:
    try:
        plain = find_tensor(network.evaluate(arguments)).float()
        padded = find_tensor(network.evaluate(padding.pad(arguments))).float()
    except PADDING_ERRORS as error:
        if is_device_error(error):
            raise
        return False
    is_half = network.module.dtype in (torch.float16, torch.bfloat16)
    tolerance = 100 * PADDING_TOLERANCE if is_half else PADDING_TOLERANCE
    return plain.shape == padded.shape and bool((plain - padded).abs().max() <= tolerance * plain.abs().max())


def takes_text_list(axes: BatchAxes, short: Mapping[str, Any], long: Mapping[str, Any]) -> bool:
    """Return whether a denoiser takes the texts of its batch elements as a list of tensors."""
    differing = _differing(short, long)
    return any(len(path) == 1 and path[0] in differing and isinstance(short[path[0]], list) for path in axes.arguments)


def make_stand_ins(axes: BatchAxes, short: Mapping[str, Any], long: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return the text arguments of a call with the longest and of one with the shortest text, one element each.

    A network may pad the texts of a batch to the longest one, and its kernels may depend on whether all are equally
    long. With both in every stack, neither depends on the rows. The calls differ only in their text.
    """
    names = _differing(short, long)
    ones = (take_one(axes, arguments) for arguments in (long, short))
    return tuple({name: one[name] for name in names} for one in ones)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Return the names of the tensors and lists that differ between two calls."""
    return {name for name in one.keys() & other.keys() if not _is_equal(one[name], other[name])}


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    return True


def take_one(axes: BatchAxes, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the call with its first batch element only."""
    element = dict(arguments)
    for path, axis in axes.arguments.items():
        value = element.get(path[0]) if len(path) == 1 else None
        if isinstance(value, torch.Tensor):
            element[path[0]] = value.narrow(axis, 0, 1)
        elif isinstance(value, list):
            element[path[0]] = value[:1]
    return element
