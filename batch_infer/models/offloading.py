"""Keep networks in host memory and move them to the GPU when they run, with accelerate's hooks.

Several rows are in progress at once, so calls of text encoders, denoiser and VAE alternate. diffusers' own offloading
moves networks away only in the order of one pipeline call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from batch_infer.accelerator import synchronize
from batch_infer.settings import Offload

HOST = torch.device("cpu")


def offload_networks(
    networks: Iterable[Any], device: torch.device, mode: Offload, checker: nn.Module | None = None
) -> None:
    """Move networks to host memory, and to `device` whenever they run. Items that are no networks are ignored.

    With `model`, a whole network moves, and at any time at most one network is on the device. With `sequential`, each
    layer moves by itself, and leaves the device after it ran. Then only the safety checker stays on the device: its
    layers are called directly.
    """
    unique = {id(network): network for network in networks if isinstance(network, nn.Module) and network is not checker}
    shared_device = OneNetworkDevice(device)
    for network in unique.values():
        network.requires_grad_(False).to(HOST)
        if mode == "model":
            add_hook_to_module(network, _LoadingHook(shared_device, network))
        else:
            cpu_offload(network, device, offload_buffers=bool(network._parameters))
    if checker is not None and mode == "model":
        checker.to(HOST)
        # The checker is not called itself. Its vision model always runs first.
        add_hook_to_module(checker.vision_model, _LoadingHook(shared_device, checker))


class OneNetworkDevice:
    """A device with room for one network at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._resident: nn.Module | None = None

    def load(self, network: nn.Module) -> None:
        """Move a network to the device, after moving the network that is there to host memory."""
        if network is self._resident:
            return
        resident, self._resident = self._resident, None
        # Weights must not become inference tensors, and modes that record or fake operations must not see the moves.
        with torch.inference_mode(False), _disable_current_modes():
            self._evict(resident)
            try:
                network.to(self.device)
                self._resident = network
            finally:
                if self._resident is None:  # out of memory
                    self._evict(network)

    def _evict(self, network: nn.Module | None) -> None:
        """Move a network to host memory, once no stream of the device uses it, and free its memory for every stream."""
        synchronize(self.device)
        if network is not None:
            network.to(HOST)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _LoadingHook(ModelHook):  # type: ignore[misc]  # accelerate has no types
    """Loads `network` before the module with this hook runs, and sends its inputs to the device."""

    def __init__(self, shared_device: OneNetworkDevice, network: nn.Module) -> None:
        self.execution_device = shared_device.device  # diffusers' pipelines read it
        self._shared_device, self._network = shared_device, network

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._shared_device.load(self._network)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)
