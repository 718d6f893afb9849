"""Random LoRAs and DoRAs in several formats for tests, with the formulas for the weights that they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

LAYERS = {
    "unet": ("attn1.to_q", "attn2.to_v", "attn1.to_out.0", "ff.net.2", "ff.net.0.proj"),
    "text_encoder": ("q_proj", "out_proj", "fc1"),
    "text_encoder_2": ("v_proj", "fc2"),
    "transformer": ("attn.to_q", "attn.to_out.0"),
}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
KOHYA_XL = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}


@dataclass(frozen=True)
class Layer:
    """A layer of a LoRA. `magnitude` belongs to a DoRA."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self, scale: float) -> torch.Tensor:
        product = self.up.flatten(1) @ self.down.flatten(1)
        return (product * scale).reshape(len(self.up), *self.down.shape[1:])

    def add(self, weight: torch.Tensor, strength: float = 1.0, alpha: float | None = None) -> torch.Tensor:
        """Return W + strength * alpha / rank * B A."""
        total: torch.Tensor = weight + self.delta(strength * (self.rank if alpha is None else alpha) / self.rank)
        return total

    def decompose(self, weight: torch.Tensor, alpha: float | None = None) -> torch.Tensor:
        """Return m (W + alpha / rank * B A) / ||W + alpha / rank * B A||, with a norm for each output (eq. 5)."""
        direction = self.add(weight, alpha=alpha)
        shape = (-1, *[1] * (weight.ndim - 1))
        norm = torch.linalg.vector_norm(direction.flatten(1), dim=1)
        decomposed: torch.Tensor = self.magnitude.reshape(shape) * direction / norm.reshape(shape)
        return decomposed


def make_layers(pipe: Any, *networks: str, convolutions: bool = False) -> dict[tuple[str, str], Layer]:
    """Make random layers whose ranks and alphas differ, by network and layer."""
    random = torch.Generator().manual_seed(0)
    layers: dict[tuple[str, str], Layer] = {}
    for network in networks:
        for name, module in getattr(pipe, network).named_modules():
            is_convolution = isinstance(module, torch.nn.Conv2d) and convolutions and "resnets" in name
            if not is_convolution and not (isinstance(module, torch.nn.Linear) and name.endswith(LAYERS[network])):
                continue
            number, weight = len(layers), module.weight
            rank = (4, 6, 3)[number % 3]
            down = torch.randn(rank, *weight.shape[1:], generator=random) * 0.2
            up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=random) * 0.2
            magnitude = torch.rand(len(weight), generator=random) + 0.5
            layers[network, name] = Layer(down, up, (2.0, 5.0, 1.5)[number % 3], magnitude)
    return layers


def as_peft(layers: dict[tuple[str, str], Layer], *, dora: bool = False) -> Tensors:
    tensors: Tensors = {}
    for (network, name), layer in layers.items():
        tensors |= {f"{network}.{name}.lora_A.weight": layer.down, f"{network}.{name}.lora_B.weight": layer.up}
        if dora:
            tensors[f"{network}.{name}.lora_magnitude_vector"] = layer.magnitude
    return tensors


def as_diffusers(layers: dict[tuple[str, str], Layer]) -> Tensors:
    tensors: Tensors = {}
    for (network, name), layer in layers.items():
        part = "lora_linear_layer" if network.startswith("text_encoder") else "lora"
        tensors[f"{network}.{name}.{part}.down.weight"] = layer.down
        tensors[f"{network}.{name}.{part}.up.weight"] = layer.up
    return tensors


def as_kohya(
    layers: dict[tuple[str, str], Layer], names: dict[str, str], *, alpha: bool = True, dora: bool = False
) -> Tensors:
    tensors: Tensors = {}
    for (network, name), layer in layers.items():
        start = names[network] + name.removeprefix("text_model.").replace(".", "_")
        tensors |= {f"{start}.lora_down.weight": layer.down, f"{start}.lora_up.weight": layer.up}
        if alpha:
            tensors[f"{start}.alpha"] = torch.tensor(layer.alpha)
        if dora:
            tensors[f"{start}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))
    return tensors
