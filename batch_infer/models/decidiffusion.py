"""DeciDiffusion 1.0 checkpoints: Stable Diffusion's parts, and its way from a prompt to an image, around another UNet.

The pipeline.py that lies beside the weights is not run, and the stock UNet in unet/ is not read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.decidiffusion_config import FlexibleUNetConfig
from batch_infer.models.decidiffusion_unet import FlexibleUNet
from batch_infer.models.files import is_loaded, variant_of
from batch_infer.models.loading import refuse_strange_weights
from batch_infer.models.stable_diffusion import StableDiffusion
from batch_infer.models.untrusted import LoadingErrors, read_object

FOLDER = "flexible_unet"


class DeciDiffusion(StableDiffusion):
    """A loaded DeciDiffusion 1.0 checkpoint."""

    @staticmethod
    def load_unet(card: ModelCard, dtype: torch.dtype) -> FlexibleUNet:
        folder = card.path / FOLDER
        config = FlexibleUNetConfig.read(read_object(folder / "config.json", card.name), folder)
        with LoadingErrors(folder):
            weights = _read_weights(folder, variant_of(folder, card.variant), dtype)
            with torch.device("meta"):  # its own first weights would be thrown away
                unet = FlexibleUNet(config)
        _refuse_others(unet, weights, folder)
        unet.load_state_dict(weights, assign=True)
        return unet.requires_grad_(False).eval()


def _read_weights(folder: Path, variant: str | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of all files of this variant: of one, or of the shards that it was cut into."""
    files = sorted(file for file in folder.glob("*.safetensors") if is_loaded(file, variant))
    return {name: tensor.to(dtype) for file in files for name, tensor in load_file(file).items()}


def _refuse_others(unet: FlexibleUNet, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Raises ModelError where the tensors are not exactly those of this network."""
    own = unet.state_dict()
    refuse_strange_weights(folder, own.keys() - weights.keys(), weights.keys() - own.keys())
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            found, wanted = (list(shape) for shape in (weights[name].shape, tensor.shape))
            raise ModelError(f"{folder} has {name} of shape {found}, where its config.json wants {wanted}")
