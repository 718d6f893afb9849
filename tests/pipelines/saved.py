"""Tiny random checkpoints of pipelines without a family, for tests of pipeline-call batching."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.checkpoints import amend, make_tokenizer
from tests.pipelines.parts import CHAT, WIDTH, make_byte_tokenizer


def save_pixart(folder: Path) -> Path:
    """Save PixArt-Sigma: a diffusion transformer with learned variance, T5 padded to a fixed length, 256 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, caption_channels=WIDTH,
            sample_size=32, norm_num_groups=4, use_additional_conditions=False,
        ).eval()  # fmt: skip
        parts = make_byte_tokenizer(300), make_t5(), make_vae(), transformer
    return _save(PixArtSigmaPipeline(*parts, DPMSolverMultistepScheduler(beta_schedule="linear")), folder)


def save_flux(folder: Path) -> Path:
    """Save FLUX.1-dev: flow matching with a schedule by image size, embedded guidance, CLIP and T5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ).eval()  # fmt: skip
        words = make_tokenizer()
        parts = make_vae(shift_factor=0.1), make_clip(words), words, make_t5(), make_byte_tokenizer(512), transformer
    return _save(FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), *parts), folder)


def save_z_image(folder: Path) -> Path:
    """Save Z-Image: flow matching, and a language model whose output is as long as the text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        transformer = ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
            axes_dims=[4, 4, 8], axes_lens=[1024, 64, 64],
        ).eval()  # fmt: skip
        language = Qwen3Model(
            Qwen3Config(
                vocab_size=300, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, head_dim=8,
            )
        ).eval()  # fmt: skip
        parts = make_vae(shift_factor=0.1), language, make_byte_tokenizer(512, CHAT), transformer
    return _save(ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), *parts), folder)


def save_sd3(folder: Path, *, with_t5: bool = True, **scheduler: Any) -> Path:
    """Save Stable Diffusion 3: flow matching, two CLIP text encoders and optionally T5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=2 * WIDTH, caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH, pos_embed_max_size=12,
        ).eval()  # fmt: skip
        words = make_tokenizer()
        encoders = [CLIPTextModelWithProjection(make_clip_config(words)).eval() for _ in range(2)]
        large = (make_t5(2 * WIDTH), make_byte_tokenizer(256)) if with_t5 else (None, None)
        decoder = make_vae(shift_factor=0.1, scaling_factor=0.6)
    flow = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler})
    parts = encoders[0], words, encoders[1], words, *large
    return _save(StableDiffusion3Pipeline(transformer, flow, decoder, *parts), folder)


def save_perturbed(sd1: Path, folder: Path) -> Path:
    """Save perturbed-attention guidance (arXiv 2403.17377) on a Stable Diffusion 1.x checkpoint, with its checker."""
    shutil.copytree(sd1, folder)
    amend(folder / "model_index.json", _class_name="StableDiffusionPAGPipeline")
    return folder


SAVE_FUNCTIONS: dict[str, Callable[[Path], Path]] = {"pixart": save_pixart, "flux": save_flux, "z_image": save_z_image}


def make_vae(latent_channels: int = 4, **settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8] * 4, down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=1, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=latent_channels, **settings,
    ).eval()  # fmt: skip


def make_t5(width: int = WIDTH) -> T5EncoderModel:
    config = T5Config(
        vocab_size=300, d_model=width, d_ff=32, d_kv=8, num_heads=2, num_layers=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def make_clip_config(words: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, projection_dim=WIDTH,
        vocab_size=len(words), bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip


def make_clip(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(make_clip_config(words)).eval()


def _save(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder
