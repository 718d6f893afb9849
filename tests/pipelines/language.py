"""Tiny random transformers that read the hidden states of Gemma, GLM, Llama, Mistral or T5Gemma."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusers import (
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PRXPipeline,
    PRXTransformer2DModel,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from tests.checkpoints import make_tokenizer
from tests.pipelines.encoders import (
    make_clip,
    make_gemma,
    make_gemma2,
    make_glm,
    make_llama,
    make_mistral3,
    make_t5,
    make_t5_gemma,
)
from tests.pipelines.parts import (
    LAST_TEXT,
    WIDTH,
    TinyPipeline,
    fill,
    make_byte_tokenizer,
    make_dc,
    make_flow,
    make_flux2_vae,
    make_kl,
    seeded,
)


def _sana(kind: Any, seed: int) -> Any:
    """Make SANA: linear attention, a long instruction before each prompt, and sizes rounded to those of a list."""
    is_sprint = kind is SanaSprintPipeline
    with seeded(seed):
        transformer = fill(
            SanaTransformer2DModel(
                patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
                num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
                sample_size=32 if is_sprint else 16, guidance_embeds=is_sprint,
                qk_norm="rms_norm_across_heads" if is_sprint else None,
            )
        )  # fmt: skip
        flow = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        )
        return kind(
            tokenizer=make_byte_tokenizer(2048), text_encoder=make_gemma2(), transformer=transformer,
            vae=make_dc(7, conv_out=0.3 if is_sprint else 1.0),
            scheduler=SCMScheduler() if is_sprint else flow,
        )  # fmt: skip


def cogview4() -> Any:
    with seeded(21):
        transformer = fill(
            CogView4Transformer2DModel(
                patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
                text_embed_dim=WIDTH, time_embed_dim=8, condition_dim=4, rope_axes_dim=(16, 16),
            )
        )  # fmt: skip
        flow = make_flow(
            shift=1.0, base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
        )
        return CogView4Pipeline(
            tokenizer=make_byte_tokenizer(1024), text_encoder=make_glm(), vae=make_kl(), transformer=transformer,
            scheduler=flow,
        )  # fmt: skip


def hidream() -> Any:
    """Make HiDream: a mixture of experts, with CLIP twice, T5, and all layers of Llama.

    It enlarges every size to an area of `default_sample_size`, which is made small here.
    """
    with seeded(22):
        transformer = fill(
            HiDreamImageTransformer2DModel(
                patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
                num_attention_heads=2, caption_channels=[WIDTH, WIDTH], text_emb_dim=2 * WIDTH, num_routed_experts=4,
                num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
            )
        )  # fmt: skip
        words = make_tokenizer()
        pipeline = HiDreamImagePipeline(
            scheduler=make_flow(), vae=make_kl(shift_factor=0.1), tokenizer=words, tokenizer_2=words,
            text_encoder=make_clip(words, projects=True, positions=128),
            text_encoder_2=make_clip(words, projects=True, positions=128), text_encoder_3=make_t5(),
            tokenizer_3=make_byte_tokenizer(128), text_encoder_4=make_llama(), tokenizer_4=make_byte_tokenizer(128),
            transformer=transformer,
        )  # fmt: skip
    pipeline.default_sample_size = 8
    return pipeline


def make_flux2_transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return fill(
        Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds,
        )
    )  # fmt: skip


def flux2() -> Any:
    """Make FLUX.2-dev, which reads layers 10, 20 and 30 of its language model."""
    with seeded(23):
        return Flux2Pipeline(
            scheduler=make_flow(use_dynamic_shifting=True), vae=make_flux2_vae(), text_encoder=make_mistral3(30),
            tokenizer=make_byte_tokenizer(512, LAST_TEXT), transformer=make_flux2_transformer(guidance_embeds=True),
        )  # fmt: skip


def lumina() -> Any:
    """Make Lumina Next, whose texts have different lengths and a mask."""
    with seeded(29):
        transformer = fill(
            LuminaNextDiT2DModel(
                sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=2,
                num_kv_heads=1, multiple_of=16, norm_eps=1e-5, cross_attention_dim=WIDTH,
            )
        )  # fmt: skip
        return LuminaPipeline(
            transformer=transformer, scheduler=make_flow(), vae=make_kl(), text_encoder=make_gemma(),
            tokenizer=make_byte_tokenizer(256),
        )  # fmt: skip


def lumina2() -> Any:
    with seeded(30):
        transformer = fill(
            Lumina2Transformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1,
                num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), cap_feat_dim=WIDTH,
                axes_lens=(512, 64, 64),
            )
        )  # fmt: skip
        return Lumina2Pipeline(
            transformer=transformer, scheduler=make_flow(), vae=make_kl(shift_factor=0.1), text_encoder=make_gemma2(),
            tokenizer=make_byte_tokenizer(256),
        )  # fmt: skip


def prx() -> Any:
    """Make PRX: a T5Gemma encoder, and sizes rounded to those of a list."""
    with seeded(32):
        transformer = fill(
            PRXTransformer2DModel(
                patch_size=2, in_channels=4, context_in_dim=WIDTH, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
                axes_dim=[4, 4],
            )
        )  # fmt: skip
        pipeline = PRXPipeline(
            transformer=transformer, scheduler=make_flow(), text_encoder=make_t5_gemma(),
            tokenizer=make_byte_tokenizer(256), vae=make_kl(shift_factor=0.1), default_sample_size=256,
        )  # fmt: skip
    pipeline.text_preprocessor = SimpleNamespace(clean_text=str)  # instead of one that needs ftfy
    return pipeline


PIPELINES = {
    "SanaPipeline": TinyPipeline(
        lambda: _sana(SanaPipeline, 20), (512, 512), other_scheduler="FlowMatchEulerDiscreteScheduler"
    ),
    "SanaPAGPipeline": TinyPipeline(lambda: _sana(SanaPAGPipeline, 20), (512, 512)),
    "SanaSprintPipeline": TinyPipeline(
        lambda: _sana(SanaSprintPipeline, 20), (1024, 1024), embeds=True, negative=False, steps=(2,)
    ),
    "CogView4Pipeline": TinyPipeline(cogview4),
    "HiDreamImagePipeline": TinyPipeline(hidream, is_saved=False),
    "Flux2Pipeline": TinyPipeline(flux2, embeds=True, negative=False),
    "LuminaPipeline": TinyPipeline(lumina),
    "Lumina2Pipeline": TinyPipeline(lumina2),
    "PRXPipeline": TinyPipeline(prx, (256, 256), is_saved=False),
}
