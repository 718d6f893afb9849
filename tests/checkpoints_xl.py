"""Tiny random checkpoints of Stable Diffusion XL for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTextModelWithProjection

from tests.checkpoints import NOISE_SCHEDULE, make_text_encoder, make_tokenizer, make_unet, make_vae

WIDTHS = (32, 48)
"""Widths of the two text encoders."""
PROJECTION, SIZE_WIDTH = 24, 8
UNET: dict[str, Any] = {
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "cross_attention_dim": sum(WIDTHS),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_WIDTH,
    "projection_class_embeddings_input_dim": 6 * SIZE_WIDTH + PROJECTION,
}
SCHEDULER = {**NOISE_SCHEDULE, "skip_prk_steps": True, "clip_sample": False}
"""Scheduler config of released checkpoints. Each scheduler class uses only some of its keys."""


def save_sdxl(folder: Path) -> Path:
    """Save Stable Diffusion XL: two text encoders, size inputs, Euler, and zeros for a missing negative prompt."""
    return _save(folder, EulerDiscreteScheduler.from_config({**SCHEDULER, "timestep_spacing": "leading"}), seed=4)


def save_sdxl_turbo(folder: Path) -> Path:
    """Save SDXL Turbo: the same networks with a sampler that draws noise, for one to four steps without guidance."""
    scheduler = EulerAncestralDiscreteScheduler.from_config({**SCHEDULER, "timestep_spacing": "trailing"})
    return _save(folder, scheduler, seed=5)


def _save(folder: Path, scheduler: Any, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = make_unet(**UNET)
        first = make_text_encoder(hidden_size=WIDTHS[0], num_hidden_layers=3, hidden_act="quick_gelu")
        second = make_text_encoder(
            CLIPTextModelWithProjection,
            hidden_size=WIDTHS[1],
            num_hidden_layers=2,
            hidden_act="gelu",
            projection_dim=PROJECTION,
        )
        vae = make_vae(scaling_factor=0.13025, force_upcast=True)
    # As in released checkpoints, the second tokenizer pads with "!", which is also an ordinary token.
    tokenizers = make_tokenizer(), make_tokenizer(pad_token="!")
    pipe = StableDiffusionXLPipeline(vae, first, second, *tokenizers, unet, scheduler, add_watermarker=False)
    pipe.save_pretrained(folder)
    return folder
