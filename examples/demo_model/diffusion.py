"""The denoiser stage: a text encoder and a UNet that learn to denoise latents by caption."""

from __future__ import annotations

import random
from dataclasses import astuple
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import tokens
import world
from autoencoder import to_tensor
from runs import Run, train

TEXT_WIDTH = 96
# Share of captions that are replaced by an empty one, for guidance.
DROPPED = 0.1
# Share of captions with meaningless words.
STRANGE = 0.08
# Without this cap, nearly clean latents, which teach only fine detail, would dominate the loss.
SNR_CAP = 5.0
CHOICES = tuple(world.COLOURS), world.SHAPES, tuple(world.SIZES), tuple(world.POSITIONS), tuple(world.GROUNDS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the untrained text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=256,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens.MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """Return the untrained denoiser."""
    return UNet2DConditionModel(
        sample_size=world.PICTURE // 8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(80, 112),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Return the noise schedule of Stable Diffusion 1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


class Denoiser(nn.Module):
    """The two networks that are trained together, and auxiliary heads for the text encoder."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.unet = build_unet()
        # Predicting the attributes from the text features trains the text encoder much earlier than the image loss.
        self.readers = nn.ModuleList(nn.Linear(TEXT_WIDTH, len(words)) for words in CHOICES)

    def reading_loss(self, features: torch.Tensor, scenes: list[world.Scene], kept: list[bool]) -> torch.Tensor:
        pooled = features.mean(1)[torch.tensor(kept)]
        attributes = [astuple(scene) for scene, keep in zip(scenes, kept, strict=True) if keep]
        loss = features.new_zeros(())
        for place, (reader, words) in enumerate(zip(self.readers, CHOICES, strict=True)):
            loss = loss + F.cross_entropy(reader(pooled), torch.tensor([words.index(row[place]) for row in attributes]))
        return loss


def training_caption(scene: world.Scene, rng: random.Random) -> str:
    """Describe a scene, sometimes with meaningless words around the caption."""
    text = world.caption(scene, rng)
    if rng.random() < STRANGE:
        letters = "abcdefghijklmnopqrstuvwxyz0123456789!.é漢"
        noise = " ".join("".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 3)))
        text = rng.choice((f"{noise} {text}", f"{text}, {noise}"))
    return text.capitalize() if rng.random() < 0.2 else text


@torch.no_grad()
def encode_drawings(run: Run, vae: AutoencoderKL) -> tuple[torch.Tensor, list[world.Scene]]:
    """Draw and encode the training set once, to latents of unit variance."""
    rng = random.Random(f"{run.seed}-latents")
    allowed, _ = world.split()
    scenes = [allowed[place % len(allowed)] for place in range(run.scale.latents)]
    vae = vae.eval().to(memory_format=torch.channels_last)
    parts = []
    for first in range(0, len(scenes), 100):
        batch = to_tensor([world.draw(scene, rng) for scene in scenes[first : first + 100]])
        parts.append(vae.encode(batch).latent_dist.mode().contiguous())
    latents = torch.cat(parts)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return latents * vae.config.scaling_factor, scenes


def load_latents(run: Run, vae: AutoencoderKL) -> tuple[torch.Tensor, list[world.Scene]]:
    """Return the encoded training set, from the file of an earlier run if there is one."""
    path: Path = run.checkpoint("latents")
    if run.resume and path.exists():
        saved = torch.load(path, weights_only=True)
        vae.register_to_config(scaling_factor=saved["scaling_factor"])
        return saved["latents"], [world.Scene(*words) for words in saved["scenes"]]
    latents, scenes = encode_drawings(run, vae)
    words = [astuple(scene) for scene in scenes]
    torch.save({"latents": latents, "scenes": words, "scaling_factor": vae.config.scaling_factor}, path)
    return latents, scenes


def train_denoiser(run: Run, vae: AutoencoderKL) -> Denoiser:
    """Train the text encoder and the UNet on the encoded drawings."""
    tokenizer = tokens.build()
    model = Denoiser(tokenizer)
    latents, scenes = load_latents(run, vae)
    kept_signal = build_scheduler().alphas_cumprod

    def loss_of(step: int) -> torch.Tensor:
        rng = random.Random(f"{run.seed}-{step}")
        torch.manual_seed(run.seed * 1_000_003 + step)
        rows = [rng.randrange(len(scenes)) for _ in range(run.scale.unet_batch)]
        kept = [rng.random() >= DROPPED for _ in rows]
        chosen = [scenes[row] for row in rows]
        texts = [training_caption(scene, rng) if keep else "" for scene, keep in zip(chosen, kept, strict=True)]
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens.MAX_TOKENS, return_tensors="pt")
        features = model.text_encoder(ids.input_ids).last_hidden_state
        times = torch.randint(len(kept_signal), (len(rows),))
        signal = kept_signal[times].view(-1, 1, 1, 1)
        noise = torch.randn(len(rows), *latents.shape[1:])
        noisy = signal.sqrt() * latents[rows] + (1 - signal).sqrt() * noise
        error = (model.unet(noisy, times, features).sample - noise).square().mean((1, 2, 3))
        ratio = kept_signal[times] / (1 - kept_signal[times])
        loss: torch.Tensor = (error * ratio.clamp(max=SNR_CAP) / ratio).mean()
        return loss + 0.05 * model.reading_loss(features, chosen, kept)

    average = train(run, "unet", model, loss_of, run.scale.unet_steps, peak=1.5e-3, decay=0.998)
    assert isinstance(average, Denoiser)
    return average
