"""DeciDiffusion 1.0: Stable Diffusion with a UNet that diffusers' block lists cannot describe.

The checkpoint's pipeline.py is not run, and its stock UNet in unet/ is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.flexible_unet import FlexibleUNet, FlexibleUNetConfig
from batch_infer.models.loading import refuse_unmatched_weights
from batch_infer.models.stable_diffusion import StableDiffusion, load_vae_and_encoder
from batch_infer.models.untrusted import LoadingErrors, list_weights, read_object

FOLDER = "flexible_unet"


class DeciDiffusion(StableDiffusion):
    """A loaded DeciDiffusion 1.0 checkpoint."""

    @classmethod
    def pipeline_class(cls, card: ModelCard) -> Any:
        return StableDiffusionPipeline

    @classmethod
    def load_modules(cls, card: ModelCard, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        # The pipeline accepts only the UNet class named by model_index.json.
        return _load_unet(card, dtype), {"unet": None, **load_vae_and_encoder(card, dtype)}


def _load_unet(card: ModelCard, dtype: torch.dtype) -> FlexibleUNet:
    folder = card.path / FOLDER
    config = FlexibleUNetConfig.read(read_object(folder / "config.json", card.name), folder)
    with LoadingErrors(folder):
        files = list_weights(folder, card.variant)
        weights = {name: tensor.to(dtype) for file in files for name, tensor in load_file(file).items()}
        with torch.device("meta"):  # allocate no initial weights
            unet = FlexibleUNet(config)
    _check_weights(unet, weights, folder)
    unet.load_state_dict(weights, assign=True)
    return unet.requires_grad_(False).eval()


def _check_weights(unet: FlexibleUNet, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Raise ModelError unless the names and shapes of the tensors match the network."""
    expected = unet.state_dict()
    refuse_unmatched_weights(folder, expected.keys() - weights.keys(), weights.keys() - expected.keys())
    for name, tensor in expected.items():
        actual, required = list(weights[name].shape), list(tensor.shape)
        if actual != required:
            raise ModelError(f"{folder} has {name} of shape {actual}, but its config.json requires {required}")
