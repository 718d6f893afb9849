"""Build the released architectures of model families with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from batch_infer.errors import ModelError
from batch_infer.models.architectures.text import CLIP_L, load_clip_tokenizer, make_clip_config
from batch_infer.models.architectures.weights import initialized_on
from batch_infer.models.card import SamplingRules
from batch_infer.models.decidiffusion import DeciDiffusion, FlexibleUNet, FlexibleUNetConfig
from batch_infer.models.families import FAMILIES
from batch_infer.models.latent_diffusion import LatentDiffusion
from batch_infer.models.stable_diffusion import StableDiffusion
from batch_infer.models.stable_diffusion_xl import StableDiffusionXL

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE_DIFFUSION: dict[str, Any] = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
STABLE_DIFFUSION_XL: dict[str, Any] = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}
DECIDIFFUSION: dict[str, Any] = {
    **STABLE_DIFFUSION,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}
FLEXIBLE_UNET = FlexibleUNetConfig(
    sample_size=64,
    temb_dim=1280,
    resnet_eps=1e-5,
    num_attention_heads=8,
    cross_attention_dim=768,
    down_blocks_in_channels=(320, 320, 640),
    down_blocks_out_channels=(320, 640, 1280),
    down_blocks_num_attentions=(0, 1, 3),
    down_blocks_num_resnets=(2, 2, 1),
    mid_num_resnets=4,
    mid_num_attentions=2,
    up_blocks_num_attentions=(6, 3, 0),
)
UNET_XL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def build_family(name: str, device: torch.device, dtype: torch.dtype) -> tuple[LatentDiffusion, SamplingRules]:
    """Build `sd15`, `decidiffusion` or `sdxl`, and derive its sampling rules. Raises ModelError for other names."""
    unet: Any
    model: LatentDiffusion
    match name:
        case "sd15":
            with initialized_on(device, dtype):
                unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
            pipeline = _build_stable_diffusion(device, dtype, unet, STABLE_DIFFUSION)
            model, config = StableDiffusion(pipeline, unet, device, dtype), unet.config
            family = FAMILIES["StableDiffusionPipeline"]
        case "decidiffusion":
            with initialized_on(device, dtype):
                unet = FlexibleUNet(FLEXIBLE_UNET)
            pipeline = _build_stable_diffusion(device, dtype, None, DECIDIFFUSION)
            model = DeciDiffusion(pipeline, unet, device, dtype)
            config = {"sample_size": FLEXIBLE_UNET.sample_size, "add_downsample": [True] * 3}
            family = FAMILIES["DeciDiffusionPipeline"]
        case "sdxl":
            pipeline = _build_stable_diffusion_xl(device, dtype)
            model, config = StableDiffusionXL(pipeline, pipeline.unet, device, dtype), pipeline.unet.config
            family = FAMILIES["StableDiffusionXLPipeline"]
        case other:
            raise ModelError(f"unknown architecture {other}")
    return model, family.make_rules(config, pipeline.vae.config, name)


def _build_stable_diffusion(device: torch.device, dtype: torch.dtype, unet: Any, schedule: dict[str, Any]) -> Any:
    """Build a Stable Diffusion 1.5 pipeline with the demo model's tokenizer. `unet` may be None."""
    tokenizer = load_clip_tokenizer()
    with initialized_on(device, dtype):
        vae = AutoencoderKL(**AUTOENCODER, sample_size=512, scaling_factor=0.18215)
        text_encoder = CLIPTextModel(make_clip_config(tokenizer, **CLIP_L))
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, DDIMScheduler(**schedule), None, None, requires_safety_checker=False
    )


def _build_stable_diffusion_xl(device: torch.device, dtype: torch.dtype) -> Any:
    """Build a Stable Diffusion XL pipeline whose VAE is not upcast to float32."""
    tokenizer = load_clip_tokenizer()
    with initialized_on(device, dtype):
        unet = UNet2DConditionModel(**UNET_XL)
        vae = AutoencoderKL(**AUTOENCODER, sample_size=1024, scaling_factor=0.13025, force_upcast=False)
        first = CLIPTextModel(make_clip_config(tokenizer, **CLIP_L))
        second = CLIPTextModelWithProjection(make_clip_config(tokenizer, **CLIP_BIG_G))
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION_XL)
    return StableDiffusionXLPipeline(
        vae, first, second, tokenizer, load_clip_tokenizer(), unet, scheduler, add_watermarker=False
    )
