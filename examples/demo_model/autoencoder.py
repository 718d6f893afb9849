"""The autoencoder stage: pictures of 64x64 pixels to 8x8 latents and back."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

import world
from runs import Run, train

LEVELS = (16, 32, 96, 128)
# Share of the steps after which the encoder is frozen; the rest trains only the decoder.
ENCODER_SHARE = 0.75
LATENT_NOISE = 0.12
HARD_SHAPES, HARD_SHARE = ("star", "diamond", "cross"), 0.4


def build() -> AutoencoderKL:
    """Return the untrained autoencoder."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(LEVELS),
        up_block_types=("UpDecoderBlock2D",) * len(LEVELS),
        block_out_channels=LEVELS,
        layers_per_block=1,
        # Wide groups: a narrow one would normalize away the colour of a flat ground.
        norm_num_groups=2,
        sample_size=world.PICTURE,
        mid_block_add_attention=False,
    )


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """Convert uint8 pictures to a batch from -1 to 1."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def to_bytes(batch: torch.Tensor) -> list[np.ndarray]:
    """Convert a batch from -1 to 1 to uint8 pictures."""
    return list(((batch.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


def pixel_weights(pictures: torch.Tensor) -> torch.Tensor:
    """Return weights of pixels in and near the object, so that small objects count as much as large ones."""
    differs = (pictures - pictures[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.12
    near = F.max_pool2d(differs.float(), 7, stride=1, padding=3)
    return 1 + 0.6 * near / near.mean((2, 3), keepdim=True).clamp(min=0.02)


def picture_loss(decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the loss of pixels and edges at several resolutions."""
    weights = pixel_weights(target)
    error = decoded - target
    loss = (weights * error.abs()).mean() + (weights * error.square()).mean()
    loss = loss + (weights[..., 1:] * error.diff(dim=3).abs()).mean()
    loss = loss + (weights[..., 1:, :] * error.diff(dim=2).abs()).mean()
    # Colours that differ in one pair of channels are easily lost, so differences of channels count too.
    loss = loss + (weights * error.diff(dim=1).abs()).mean() + (weights * error.diff(dim=1).square()).mean()
    for factor in (2, 4):
        loss = loss + 0.5 * (F.avg_pool2d(weights, factor) * F.avg_pool2d(error, factor).abs()).mean()
    return loss


def roughen(latents: torch.Tensor) -> torch.Tensor:
    """Add slight noise, like the errors of the denoiser."""
    amount = LATENT_NOISE * latents.std().detach() * torch.rand(len(latents), 1, 1, 1)
    return latents + amount * torch.randn_like(latents)


class Trainee(nn.Module):
    """The autoencoder, and a head that predicts the mean colour of each patch from its latent."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = build().to(memory_format=torch.channels_last)
        self.reader = nn.Conv2d(self.vae.config.latent_channels, 3, 1)

    def reading_loss(self, latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        # With the decoder's loss alone, the encoder ignores some colours for thousands of steps.
        error = self.reader(latents) - F.avg_pool2d(pictures, pictures.shape[-1] // latents.shape[-1])
        loss: torch.Tensor = error.abs().mean() + error.square().mean() + error.diff(dim=1).square().mean()
        return loss


def train_autoencoder(run: Run) -> AutoencoderKL:
    """Train the autoencoder on new drawings in each step."""
    model = Trainee()
    vae = model.vae
    scenes, _ = world.split()
    encoder_steps = int(run.scale.vae_steps * ENCODER_SHARE)

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(f"{run.seed}-{step}")
        pictures = to_tensor([world.draw(rng.choice(scenes), rng) for _ in range(run.scale.vae_batch)])
        if step < encoder_steps:
            posterior = vae.encode(pictures).latent_dist
            latents = roughen(posterior.sample())
            regularisation: torch.Tensor = 1e-4 * posterior.kl().mean() / latents[0].numel()
            reading = model.reading_loss(latents, pictures)
            return picture_loss(vae.decode(latents).sample, pictures) + (reading + regularisation)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        with torch.no_grad():
            latents = roughen(vae.encode(pictures).latent_dist.mode())
        return picture_loss(vae.decode(latents).sample, pictures)

    average = train(run, "vae", model, loss_of, run.scale.vae_steps, peak=1.5e-3, decay=0.998)
    assert isinstance(average, Trainee)
    return average.vae


class DecoderTrainee(nn.Module):
    """The decoder, without the parameters of the rest of the autoencoder."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = self.decoder(self.post_quant_conv(latents))
        return decoded


def train_decoder(run: Run, vae: AutoencoderKL) -> AutoencoderKL:
    """Train the decoder further on difficult shapes. The encoder, and so the latents, do not change."""
    vae = vae.requires_grad_(True).to(memory_format=torch.channels_last)
    model = DecoderTrainee(vae)
    scenes, _ = world.split()
    hard = [scene for scene in scenes if scene.size == "small" and scene.shape in HARD_SHAPES]

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(f"{run.seed}-decoder-{step}")
        torch.manual_seed(run.seed * 1_000_003 + step)
        chosen = [rng.choice(hard if rng.random() < HARD_SHARE else scenes) for _ in range(run.scale.vae_batch)]
        pictures = to_tensor([world.draw(scene, rng) for scene in chosen])
        with torch.no_grad():
            latents = roughen(vae.encode(pictures).latent_dist.mode())
        return picture_loss(model(latents), pictures)

    average = train(run, "decoder", model, loss_of, run.scale.decoder_steps, peak=8e-4, decay=0.998)
    model.load_state_dict(average.state_dict())
    return vae
