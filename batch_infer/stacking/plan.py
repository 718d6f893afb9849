"""Define how the calls of a pipeline's networks are stacked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from batch_infer.stacking.networks import Network
from batch_infer.stacking.trees import BatchAxes, UnstackableError

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TextPadding:
    """Pads the text arguments of a denoiser to one length, and masks the padding.

    `axes` contains the text axis of each argument that is as long as the text. `mask` is the argument that is created
    if a call has none, since networks may compute without a mask differently than with one that is all true.
    """

    text: str
    axes: Mapping[str, int]
    mask: str | None
    length: int

    def pad(self, arguments: Arguments) -> dict[str, Any]:
        """Return the arguments with texts of at least `length`, with zeros and False as padding."""
        padded, axes = dict(arguments), dict(self.axes)
        text = padded.get(self.text)
        if not isinstance(text, torch.Tensor):
            return padded
        if self.mask is not None and padded.get(self.mask) is None:
            padded[self.mask] = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            axes[self.mask] = 1
        for name, axis in axes.items():
            value = padded.get(name)
            if isinstance(value, torch.Tensor) and value.shape[axis] < self.length:
                shape = list(value.shape)
                shape[axis] = self.length - value.shape[axis]
                padded[name] = torch.cat([value, value.new_zeros(shape)], axis)
        return padded


@dataclass(frozen=True, slots=True)
class StackingPlan:
    """Which calls of a pipeline can be stacked, and how.

    `axes`: by network name; calls of a network without axes are not stacked. `paddings`: by denoiser. `stand_ins`: by
    denoiser, the text arguments of dummy batch elements that are added to every stack, with the longest and the
    shortest text, so that the network pads the texts of every batch to one length. `is_alone`: only one row at a time
    may be in progress, since rows would affect each other. `reasons`: why calls are not stacked.
    """

    networks: tuple[Network, ...]
    axes: Mapping[str, BatchAxes] = field(default_factory=dict)
    paddings: Mapping[str, TextPadding] = field(default_factory=dict)
    stand_ins: Mapping[str, tuple[Arguments, ...]] = field(default_factory=dict)
    host_timesteps: bool = False
    is_alone: bool = False
    reasons: tuple[str, ...] = ()

    def count_elements(self, network: Network, arguments: Arguments) -> int:
        """Return the batch elements of a call."""
        with suppress(UnstackableError):
            return self.axes.get(network.name, BatchAxes()).count_elements(arguments)
        tensors = (value for value in arguments.values() if isinstance(value, torch.Tensor) and value.ndim > 1)
        return next((len(value) for value in tensors), 1)

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self.networks[0].device

    @property
    def is_stacked(self) -> bool:
        """Whether calls of all denoisers are stacked."""
        denoisers = [network.name for network in self.networks if network.kind == "denoise"]
        return not self.is_alone and bool(denoisers) and all(name in self.axes for name in denoisers)
