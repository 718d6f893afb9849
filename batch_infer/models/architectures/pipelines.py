"""Build the released architectures of diffusers pipelines without a model family, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from msgspec import structs
from transformers import CLIPTextModel, Qwen3ForCausalLM, Qwen3Model

from batch_infer.models.any_pipeline import AnyPipeline
from batch_infer.models.architectures import text
from batch_infer.models.architectures.families import build_family
from batch_infer.models.architectures.weights import Sizes, initialized_on
from batch_infer.models.card import SamplingRules
from batch_infer.models.latent_diffusion import LatentDiffusion
from batch_infer.models.pipeline_rules import make_rules

FLUX = Sizes(
    {},
    {
        **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
    },
)
"""FLUX.1-schnell: diffusers' defaults, as in its scripts/convert_flux_to_diffusers.py. 11.89e9 parameters."""
FLUX2_KLEIN_4B = Sizes(
    {
        **{"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        "guidance_embeds": False,
    },
    {
        **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"joint_attention_dim": 96, "axes_dims_rope": (4, 4, 4, 4)},
    },
)
"""FLUX.2-klein-4B: Klein4BParams in src/flux2/model.py of black-forest-labs/flux2. 3.88e9 parameters."""
QWEN_IMAGE = Sizes(
    {},
    {
        **{"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32},
        "axes_dims_rope": (4, 6, 6),
    },
)
"""Qwen-Image: diffusers' defaults. 20.43e9 parameters (Qwen-Image Technical Report, arXiv 2508.02324: 20B)."""
Z_IMAGE = Sizes(
    {},
    {
        **{"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32},
        "axes_dims": [4, 6, 6],
    },
)
"""Z-Image-Turbo: diffusers' defaults. 6.15e9 parameters (Z-Image, arXiv 2511.22699)."""
SANA = Sizes(
    {},
    {
        **{"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1},
        **{"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32},
        **{"caption_channels": 32, "sample_size": 16},
    },
)
"""SanaMS_1600M_P1_D20 in diffusers' scripts/convert_sana_to_diffusers.py, which diffusers' defaults equal.

1.6e9 parameters (SANA, arXiv 2410.10629).
"""

SMALL_VAE: dict[str, Any] = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
FLUX_VAE = Sizes(
    {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        **{"layers_per_block": 2, "latent_channels": 16, "sample_size": 1024, "force_upcast": False},
        **{"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False},
    },
    SMALL_VAE,
)
"""The VAE of FLUX.1 and Z-Image: `ae_params` in src/flux/util.py of black-forest-labs/flux."""
FLUX2_VAE = Sizes({}, SMALL_VAE)
"""diffusers' defaults, which equal AutoEncoderParams in src/flux2/autoencoder.py of black-forest-labs/flux2."""
QWEN_VAE = Sizes({}, {"base_dim": 8, "num_res_blocks": 1})
"""diffusers' defaults."""
DC_AE = Sizes(
    {
        **dict.fromkeys(("encoder_block_types", "decoder_block_types"), ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3),
        **{"downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.41407},
    },
    {
        **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (16,) * 6),
        **dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), (1,) * 6),
        **{"latent_channels": 16, "attention_head_dim": 8},
    },
)
"""dc-ae-f32c32-sana-1.0 in diffusers' scripts/convert_dcae_to_diffusers.py. The other values are its defaults."""

QWEN_SCHEDULE: dict[str, Any] = {
    **{"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256},
    **{"max_image_seq_len": 8192, "shift_terminal": 0.02, "time_shift_type": "exponential"},
}
"""scheduler_config.json of Qwen/Qwen-Image."""
SANA_SCHEDULE: dict[str, Any] = {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""The scheduler of scripts/convert_sana_to_diffusers.py for 1024 pixels."""
SMALL_SIDE = 64
"""Default image side of small pipelines in pixels."""


@dataclass(frozen=True, slots=True)
class PipelineArchitecture:
    """Functions that make a scheduler and a pipeline, and the steps and guidance scale of the model card.

    `build` gets whether to build a small pipeline, and the scheduler. With None, the pipeline's defaults apply.
    """

    make_scheduler: Callable[[], Any]
    build: Callable[[bool, Any], Any]
    steps: int | None = None
    guidance_scale: float | None = None


def build_architecture(
    name: str, device: torch.device, dtype: torch.dtype, *, small: bool = False
) -> tuple[LatentDiffusion | AnyPipeline, SamplingRules]:
    """Build an architecture and derive its sampling rules. `small` has an effect only on those in PIPELINES.

    Raises ModelError for an unknown name.
    """
    if name not in PIPELINES:
        return build_family(name, device, dtype)
    architecture, pipeline = PIPELINES[name], build_pipeline(name, device, dtype, small=small)
    rules = make_rules(pipeline)
    if small:
        rules = replace(rules, sizes=structs.replace(rules.sizes, native_height=SMALL_SIDE, native_width=SMALL_SIDE))
    if architecture.steps is not None:
        rules = replace(rules, num_inference_steps=architecture.steps)
    if architecture.guidance_scale is not None:
        rules = replace(rules, guidance_scale=architecture.guidance_scale)
    return AnyPipeline(pipeline, rules, device, dtype), rules


def build_pipeline(name: str, device: torch.device, dtype: torch.dtype, *, small: bool = False) -> Any:
    """Build the pipeline of an architecture in PIPELINES, or with `small` a tiny one with the same components."""
    architecture = PIPELINES[name]
    scheduler = architecture.make_scheduler()  # its tables are in host memory and in float32
    with initialized_on(device, dtype):
        pipeline = architecture.build(small, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _build_flux(small: bool, scheduler: Any) -> FluxPipeline:
    clip_tokenizer = text.load_clip_tokenizer()
    return FluxPipeline(
        scheduler,
        AutoencoderKL(**FLUX_VAE.at(small)).eval(),
        CLIPTextModel(text.make_clip_config(clip_tokenizer, **text.CLIP.at(small))).eval(),
        clip_tokenizer,
        text.make_t5(small),
        text.make_tokenizer("$A </s>"),
        FluxTransformer2DModel(**FLUX.at(small)).eval(),
    )


def _build_flux2_klein(small: bool, scheduler: Any) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler,
        AutoencoderKLFlux2(**FLUX2_VAE.at(small)).eval(),
        text.make_qwen3(Qwen3ForCausalLM, small),
        text.make_tokenizer(chat=text.QWEN_CHAT),
        Flux2Transformer2DModel(**FLUX2_KLEIN_4B.at(small)).eval(),
        is_distilled=True,
    )


def _build_qwen_image(small: bool, scheduler: Any) -> QwenImagePipeline:
    return QwenImagePipeline(
        scheduler,
        AutoencoderKLQwenImage(**QWEN_VAE.at(small)).eval(),
        text.make_qwen2_5_vl(small),
        text.make_tokenizer(),
        QwenImageTransformer2DModel(**QWEN_IMAGE.at(small)).eval(),
    )


def _build_z_image(small: bool, scheduler: Any) -> ZImagePipeline:
    return ZImagePipeline(
        scheduler,
        AutoencoderKL(**FLUX_VAE.at(small)).eval(),
        text.make_qwen3(Qwen3Model, small),
        text.make_tokenizer(chat=text.QWEN_CHAT),
        ZImageTransformer2DModel(**Z_IMAGE.at(small)).eval(),
    )


def _build_sana(small: bool, scheduler: Any) -> SanaPipeline:
    return SanaPipeline(
        text.make_tokenizer("<bos> $A"),
        text.make_gemma2(small),
        AutoencoderDC(**DC_AE.at(small)).eval(),
        SanaTransformer2DModel(**SANA.at(small)).eval(),
        scheduler,
    )


PIPELINES = {
    "flux-schnell": PipelineArchitecture(FlowMatchEulerDiscreteScheduler, _build_flux, steps=4),
    "flux2-klein": PipelineArchitecture(
        partial(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True),
        _build_flux2_klein,
        steps=4,
        guidance_scale=1.0,
    ),
    "qwen-image": PipelineArchitecture(partial(FlowMatchEulerDiscreteScheduler, **QWEN_SCHEDULE), _build_qwen_image),
    "z-image": PipelineArchitecture(
        partial(FlowMatchEulerDiscreteScheduler, shift=3.0), _build_z_image, steps=9, guidance_scale=0.0
    ),
    "sana": PipelineArchitecture(partial(DPMSolverMultistepScheduler, **SANA_SCHEDULE), _build_sana),
}
"""The architectures. Steps and guidance are those of the model cards of the distilled models."""
