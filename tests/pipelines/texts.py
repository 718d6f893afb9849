"""Tiny random transformers that read T5, BERT or CLIP, whose texts are padded to a fixed length."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPAGPipeline,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)

from tests.checkpoints import make_tokenizer
from tests.pipelines.encoders import make_bert, make_clip, make_t5, make_umt5
from tests.pipelines.parts import WIDTH, TinyPipeline, fill, make_byte_tokenizer, make_flow, make_kl, seeded

SOLVER = {"beta_schedule": "linear"}


def _pixart(kind: Any, seed: int) -> Any:
    """Make PixArt: a diffusion transformer with learned variance, 256 pixels."""
    with seeded(seed):
        transformer = fill(
            PixArtTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16,
                caption_channels=WIDTH, sample_size=32, norm_num_groups=4, use_additional_conditions=False,
            ),
            attn2=2.0,
        )  # fmt: skip
        return kind(
            tokenizer=make_byte_tokenizer(300), text_encoder=make_t5(), vae=make_kl(), transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(**SOLVER),
        )  # fmt: skip


def flux() -> Any:
    """Make FLUX.1-dev: embedded guidance, CLIP and T5."""
    with seeded(12):
        transformer = fill(
            FluxTransformer2DModel(
                patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
                guidance_embeds=True,
            )
        )  # fmt: skip
        words = make_tokenizer()
        return FluxPipeline(
            scheduler=make_flow(use_dynamic_shifting=True), vae=make_kl(shift_factor=0.1), tokenizer=words,
            text_encoder=make_clip(words), text_encoder_2=make_t5(),
            tokenizer_2=make_byte_tokenizer(512), transformer=transformer,
        )  # fmt: skip


def chroma() -> Any:
    """Make Chroma: FLUX.1 with a network that computes all modulations, and with guidance."""
    with seeded(13):
        transformer = fill(
            ChromaTransformer2DModel(
                patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
                approximator_hidden_dim=16, approximator_layers=1,
            )
        )  # fmt: skip
        return ChromaPipeline(
            scheduler=make_flow(), vae=make_kl(shift_factor=0.1), text_encoder=make_t5(),
            tokenizer=make_byte_tokenizer(512), transformer=transformer,
        )  # fmt: skip


def bria() -> Any:
    """Make Bria 3.2: T5 called for each text without padding, whose results are padded."""
    with seeded(14):
        transformer = fill(
            BriaTransformer2DModel(
                patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
                num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=[0, 4, 4],
            )
        )  # fmt: skip
        return BriaPipeline(
            transformer=transformer, scheduler=make_flow(), vae=make_kl(shift_factor=0.1), text_encoder=make_t5(),
            tokenizer=make_byte_tokenizer(128),
        )  # fmt: skip


def _stable_diffusion_3(kind: Any, seed: int) -> Any:
    """Make Stable Diffusion 3 or a variant of it: two CLIP text encoders and T5."""
    with seeded(seed):
        transformer = fill(
            SD3Transformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                num_attention_heads=4, joint_attention_dim=2 * WIDTH, caption_projection_dim=32,
                pooled_projection_dim=2 * WIDTH, pos_embed_max_size=12,
            )
        )  # fmt: skip
        words = make_tokenizer()
        return kind(
            transformer=transformer, scheduler=make_flow(), vae=make_kl(shift_factor=0.1),
            text_encoder=make_clip(words, projects=True), tokenizer=words,
            text_encoder_2=make_clip(words, projects=True), tokenizer_2=words, text_encoder_3=make_t5(2 * WIDTH),
            tokenizer_3=make_byte_tokenizer(256),
        )  # fmt: skip


def aura_flow() -> Any:
    with seeded(16):
        transformer = fill(
            AuraFlowTransformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
                attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16,
                pos_embed_max_size=64,
            )
        )  # fmt: skip
        return AuraFlowPipeline(
            tokenizer=make_byte_tokenizer(256), text_encoder=make_umt5(), vae=make_kl(), transformer=transformer,
            scheduler=make_flow(shift=1.73),
        )  # fmt: skip


def cogview3() -> Any:
    """Make CogView3-Plus: inputs for sizes, and its own scheduler."""
    with seeded(17):
        transformer = fill(
            CogView3PlusTransformer2DModel(
                patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
                text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
            )
        )  # fmt: skip
        return CogView3PlusPipeline(
            tokenizer=make_byte_tokenizer(224), text_encoder=make_t5(), vae=make_kl(), transformer=transformer,
            scheduler=CogVideoXDDIMScheduler(),
        )  # fmt: skip


def _hunyuan_dit(kind: Any, seed: int) -> Any:
    """Make HunyuanDiT: BERT and T5. It supports only sizes from 768x1024 pixels, so the patches are large.

    Diffusers' perturbed attention supports only HunyuanDiT 1.2, which has no inputs for style and size.
    """
    with seeded(seed):
        transformer = fill(
            HunyuanDiT2DModel(
                sample_size=128, num_layers=2, patch_size=16, attention_head_dim=8, num_attention_heads=2,
                in_channels=4, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=16,
                hidden_size=16, use_style_cond_and_image_meta_size=kind is HunyuanDiTPipeline,
            )
        )  # fmt: skip
        return kind(
            vae=make_kl(), text_encoder=make_bert(), tokenizer=make_byte_tokenizer(77), transformer=transformer,
            scheduler=DDPMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            text_encoder_2=make_t5(), tokenizer_2=make_byte_tokenizer(256),
        )  # fmt: skip


PIPELINES = {
    "PixArtAlphaPipeline": TinyPipeline(
        lambda: _pixart(PixArtAlphaPipeline, 10), (256, 256), other_scheduler="EulerDiscreteScheduler"
    ),
    "PixArtSigmaPipeline": TinyPipeline(
        lambda: _pixart(PixArtSigmaPipeline, 11), (256, 256), other_scheduler="EulerAncestralDiscreteScheduler"
    ),
    "PixArtSigmaPAGPipeline": TinyPipeline(lambda: _pixart(PixArtSigmaPAGPipeline, 11), (256, 256)),
    "FluxPipeline": TinyPipeline(flux, embeds=True, negative=False),
    "ChromaPipeline": TinyPipeline(chroma),
    "BriaPipeline": TinyPipeline(bria),
    "StableDiffusion3Pipeline": TinyPipeline(lambda: _stable_diffusion_3(StableDiffusion3Pipeline, 15)),
    "StableDiffusion3PAGPipeline": TinyPipeline(lambda: _stable_diffusion_3(StableDiffusion3PAGPipeline, 15)),
    "AuraFlowPipeline": TinyPipeline(aura_flow),
    "CogView3PlusPipeline": TinyPipeline(cogview3),
    "HunyuanDiTPipeline": TinyPipeline(
        lambda: _hunyuan_dit(HunyuanDiTPipeline, 18), (1024, 768), other_scheduler="DDIMScheduler"
    ),
    "HunyuanDiTPAGPipeline": TinyPipeline(lambda: _hunyuan_dit(HunyuanDiTPAGPipeline, 18), (1024, 768)),
}
