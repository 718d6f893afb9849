"""Tiny random transformers that read the hidden states of a Qwen language model."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    Flux2KleinPipeline,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from tests.checkpoints import make_tokenizer
from tests.pipelines.encoders import (
    LOUD,
    make_clip,
    make_qwen3,
    make_qwen3_vl,
    make_qwen_vl,
)
from tests.pipelines.language import make_flux2_transformer
from tests.pipelines.parts import (
    CHAT,
    LAST_WORDS,
    WIDTH,
    TinyPipeline,
    fill,
    make_byte_tokenizer,
    make_flow,
    make_flux2_vae,
    make_kl,
    make_qwen_vae,
    seeded,
)


def flux2_klein() -> Any:
    """Make FLUX.2 klein, with guidance by two calls. It reads layers 9, 18 and 27 of its language model."""
    with seeded(24):
        return Flux2KleinPipeline(
            scheduler=make_flow(use_dynamic_shifting=True), vae=make_flux2_vae(),
            text_encoder=make_qwen3(27, with_head=True), tokenizer=make_byte_tokenizer(512, CHAT),
            transformer=make_flux2_transformer(guidance_embeds=False),
        )  # fmt: skip


def krea2() -> Any:
    """Make Krea 2, which reads several layers of its language model, with the padding before the text's end."""
    with seeded(25):
        transformer = fill(
            Krea2Transformer2DModel(
                in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
                intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=WIDTH, num_text_layers=3,
                text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
                num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
            )
        )  # fmt: skip
        return Krea2Pipeline(
            scheduler=make_flow(use_dynamic_shifting=True), vae=make_qwen_vae(), text_encoder=make_qwen3_vl(),
            tokenizer=make_byte_tokenizer(1024), transformer=transformer, text_encoder_select_layers=(0, 1, 2),
        )  # fmt: skip


def hunyuan_image() -> Any:
    """Make HunyuanImage 2.1: guidance with momentum, and other guidance for prompts that quote a text."""
    with seeded(26):
        transformer = fill(
            HunyuanImageTransformer2DModel(
                in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
                num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=WIDTH,
                text_embed_2_dim=WIDTH, rope_axes_dim=(4, 4),
            )
        )  # fmt: skip
        vae = AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1,
            scaling_factor=0.5, spatial_compression_ratio=8, sample_size=64,
        )  # fmt: skip
        glyphs = T5Config(
            vocab_size=384, d_model=WIDTH, d_ff=32, d_kv=8, num_heads=2, num_layers=2, feed_forward_proj="gated-gelu"
        )
        return HunyuanImagePipeline(
            scheduler=make_flow(shift=5.0), vae=fill(vae), text_encoder=make_qwen_vl(),
            tokenizer=make_byte_tokenizer(2048), text_encoder_2=fill(T5EncoderModel(glyphs), **LOUD),
            tokenizer_2=ByT5Tokenizer(), transformer=transformer,
            guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
            ocr_guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3),
        )  # fmt: skip


def kandinsky5() -> Any:
    """Make Kandinsky 5 for smaller images than its fixed sizes."""
    with seeded(27):
        transformer = fill(
            Kandinsky5Transformer3DModel(
                in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=4,
                patch_size=(1, 2, 2), model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2,
                axes_dims=(4, 2, 2),
            )
        )  # fmt: skip
        words = make_tokenizer()
        pipeline = Kandinsky5T2IPipeline(
            transformer=transformer, vae=make_kl(), text_encoder=make_qwen_vl(), tokenizer=make_byte_tokenizer(1024),
            text_encoder_2=make_clip(words), tokenizer_2=words, scheduler=make_flow(),
        )  # fmt: skip
    pipeline.resolutions = [(64, 64)]
    return pipeline


def longcat() -> Any:
    """Make LongCat-Image, whose language model first rewrites the prompt. Its weights end the new text early."""
    with seeded(28):
        transformer = fill(
            LongCatImageTransformer2DModel(
                patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 4, 8],
            )
        )  # fmt: skip
        with seeded(0):
            encoder = make_qwen_vl()
        encoder.lm_head.weight.data[1] *= 2.5  # the end of the text
        encoder.generation_config.eos_token_id, encoder.generation_config.pad_token_id = 1, 0
        tokenizer = make_byte_tokenizer(1024, LAST_WORDS)
        return LongCatImagePipeline(
            scheduler=make_flow(use_dynamic_shifting=True), vae=make_kl(16, shift_factor=0.1), text_encoder=encoder,
            tokenizer=tokenizer, text_processor=tokenizer, transformer=transformer,
        )  # fmt: skip


def ovis() -> Any:
    with seeded(31):
        transformer = fill(
            OvisImageTransformer2DModel(
                patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
            )
        )  # fmt: skip
        return OvisImagePipeline(
            scheduler=make_flow(use_dynamic_shifting=True), vae=make_kl(shift_factor=0.1), text_encoder=make_qwen3(),
            tokenizer=make_byte_tokenizer(1024, CHAT), transformer=transformer,
        )  # fmt: skip


def qwen_image() -> Any:
    with seeded(33):
        transformer = fill(
            QwenImageTransformer2DModel(
                patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(8, 4, 4),
            )
        )  # fmt: skip
        return QwenImagePipeline(
            scheduler=make_flow(use_dynamic_shifting=True), vae=make_qwen_vae(), text_encoder=make_qwen_vl(),
            tokenizer=make_byte_tokenizer(2048), transformer=transformer,
        )  # fmt: skip


def z_image() -> Any:
    """Make Z-Image, whose transformer receives lists of latents and texts."""
    with seeded(34):
        transformer = fill(
            ZImageTransformer2DModel(
                in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
                axes_dims=[4, 4, 8], axes_lens=[1024, 64, 64],
            )
        )  # fmt: skip
        return ZImagePipeline(
            scheduler=make_flow(), vae=make_kl(shift_factor=0.1), text_encoder=make_qwen3(),
            tokenizer=make_byte_tokenizer(512, CHAT), transformer=transformer,
        )  # fmt: skip


PIPELINES = {
    "Flux2KleinPipeline": TinyPipeline(flux2_klein, negative=False),
    "Krea2Pipeline": TinyPipeline(krea2),
    "HunyuanImagePipeline": TinyPipeline(hunyuan_image, (32, 32), guidance=None),
    "Kandinsky5T2IPipeline": TinyPipeline(kandinsky5, is_saved=False),
    "LongCatImagePipeline": TinyPipeline(longcat),
    "OvisImagePipeline": TinyPipeline(ovis),
    "QwenImagePipeline": TinyPipeline(qwen_image, guidance="true_cfg_scale"),
    "ZImagePipeline": TinyPipeline(z_image),
}
