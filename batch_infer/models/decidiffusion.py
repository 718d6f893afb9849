"""Load DeciDiffusion 1.0: Stable Diffusion with a UNet that diffusers' block lists cannot describe.

The checkpoint's pipeline.py never runs, and its stock UNet in unet/ is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

from batch_infer.models.card import ModelCard
from batch_infer.models.flexible_unet import FlexibleUNet, FlexibleUNetConfig
from batch_infer.models.loading import refuse_unmatched_weights
from batch_infer.models.stable_diffusion import StableDiffusion, load_vae_and_encoder
from batch_infer.models.untrusted import LoadingErrors, list_weights, read_object

FOLDER = "flexible_unet"


class DeciDiffusion(StableDiffusion):
    """A loaded DeciDiffusion 1.0 checkpoint."""

    @classmethod
    def load_modules(cls, card: ModelCard, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        folder = card.path / FOLDER
        config = FlexibleUNetConfig.read(read_object(folder / "config.json", card.name), folder)
        with torch.device("meta"):  # allocate no initial weights
            unet = FlexibleUNet(config)
        with LoadingErrors(folder):
            files = list_weights(folder, card.variant)
            weights = {name: tensor.to(dtype) for file in files for name, tensor in load_file(file).items()}
        expected = unet.state_dict()
        refuse_unmatched_weights(folder, expected.keys() - weights.keys(), weights.keys() - expected.keys())
        with LoadingErrors(folder):
            unet.load_state_dict(weights, assign=True)
        # The pipeline accepts only the UNet class in model_index.json.
        return unet.requires_grad_(False).eval(), {"unet": None, **load_vae_and_encoder(card, dtype)}
