"""Tiny random pipelines around a UNet: Stable Diffusion and variants, DeepFloyd IF, Kandinsky, Stable Cascade."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EulerDiscreteScheduler,
    IFPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    KandinskyCombinedPipeline,
    KandinskyV22CombinedPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PriorTransformer,
    StableCascadeCombinedPipeline,
    StableCascadeUNet,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.checkpoints import NOISE_SCHEDULE, make_tokenizer, make_unet
from tests.checkpoints_xl import SIZE_WIDTH
from tests.pipelines.encoders import make_clip, make_multilingual_clip, make_t5
from tests.pipelines.parts import (
    WIDTH,
    TinyPipeline,
    fill,
    make_byte_tokenizer,
    make_kl,
    make_movq,
    seeded,
)


def _stable_diffusion(kind: Any, seed: int) -> Any:
    """Make Stable Diffusion 1.x or a variant of it, without a checker."""
    is_consistent = kind is LatentConsistencyModelPipeline
    with seeded(seed):
        unet = fill(
            make_unet(
                attention_head_dim=4, cross_attention_dim=WIDTH, time_cond_proj_dim=16 if is_consistent else None
            ),
            attn2=1.5,
        )
        words = make_tokenizer()
        return kind(
            vae=make_kl(), text_encoder=make_clip(words), tokenizer=words, unet=unet, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
            scheduler=(LCMScheduler if is_consistent else DDIMScheduler).from_config(
                {**NOISE_SCHEDULE, "clip_sample": False}
            ),
        )  # fmt: skip


def _stable_diffusion_xl(kind: Any, seed: int) -> Any:
    """Make Stable Diffusion XL or a variant of it."""
    with seeded(seed):
        unet = fill(
            make_unet(
                attention_head_dim=[2, 4], use_linear_projection=True, cross_attention_dim=2 * WIDTH,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=[1, 2],
                addition_embed_type="text_time", addition_time_embed_dim=SIZE_WIDTH,
                projection_class_embeddings_input_dim=6 * SIZE_WIDTH + WIDTH,
            ),
            attn2=1.5,
        )  # fmt: skip
        words = make_tokenizer()
        return kind(
            vae=make_kl(scaling_factor=0.13025), text_encoder=make_clip(words), tokenizer=words,
            text_encoder_2=make_clip(words, projects=True), tokenizer_2=words, unet=unet, add_watermarker=False,
            scheduler=EulerDiscreteScheduler.from_config({**NOISE_SCHEDULE, "timestep_spacing": "leading"}),
        )  # fmt: skip


def _simple_unet(encoder_width: int, **settings: Any) -> UNet2DConditionModel:
    """Make a UNet whose attention reads text and image in one go, as DeepFloyd IF and Kandinsky 2 use it."""
    return fill(
        UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=8,
            encoder_hid_dim=encoder_width,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=32,
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift", **settings,
        )
    )  # fmt: skip


def deep_floyd() -> Any:
    """Make DeepFloyd IF: a UNet on pixels, thresholding, and noise at every step."""
    with seeded(45):
        unet = _simple_unet(
            WIDTH, in_channels=3, out_channels=6, addition_embed_type="text", addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm", act_fn="gelu",
        )  # fmt: skip
        scheduler = DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95,
            sample_max_value=1.0, variance_type="learned_range",
        )  # fmt: skip
        return IFPipeline(
            tokenizer=make_byte_tokenizer(77), text_encoder=make_t5(), unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False,
        )  # fmt: skip


def kandinsky3() -> Any:
    with seeded(46):
        unet = fill(
            Kandinsky3UNet(
                in_channels=4, time_embedding_dim=8, groups=4, attention_head_dim=4, layers_per_block=2,
                block_out_channels=(16, 32), cross_attention_dim=8, encoder_hid_dim=WIDTH,
            )
        )  # fmt: skip
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="squaredcos_cap_v2")
        return Kandinsky3Pipeline(
            tokenizer=make_byte_tokenizer(128), text_encoder=make_t5(), unet=unet, scheduler=scheduler, movq=make_movq()
        )


def _kandinsky_prior(width: int = 32) -> dict[str, Any]:
    """Make the components of the first stage: a transformer that turns texts into embeddings of images."""
    words = make_tokenizer()
    prior = fill(PriorTransformer(num_attention_heads=2, attention_head_dim=8, embedding_dim=width, num_layers=1))
    prior.clip_std.data.fill_(1.0)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, image_size=32, projection_dim=width, intermediate_size=16, num_attention_heads=2,
        num_hidden_layers=1, patch_size=16,
    )  # fmt: skip
    scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0
    )
    return {
        "prior_prior": prior, "prior_image_encoder": fill(CLIPVisionModelWithProjection(vision)),
        "prior_text_encoder": make_clip(words, width, projects=True), "prior_tokenizer": words,
        "prior_scheduler": scheduler,
        "prior_image_processor": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
    }  # fmt: skip


def kandinsky() -> Any:
    """Make Kandinsky 2.1: a prior, and a UNet that reads its output and a multilingual text encoder."""
    with seeded(47):
        unet = _simple_unet(
            WIDTH, in_channels=4, out_channels=8, addition_embed_type="text_image",
            encoder_hid_dim_type="text_image_proj",
        )  # fmt: skip
        return KandinskyCombinedPipeline(
            text_encoder=make_multilingual_clip(), tokenizer=make_byte_tokenizer(77), unet=unet,
            scheduler=DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False), movq=make_movq(), **_kandinsky_prior(),
        )  # fmt: skip


def kandinsky22() -> Any:
    """Make Kandinsky 2.2: a prior, and a UNet that reads its output."""
    with seeded(48):
        unet = _simple_unet(
            32, in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim_type="image_proj"
        )
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012)
        return KandinskyV22CombinedPipeline(unet=unet, scheduler=scheduler, movq=make_movq(), **_kandinsky_prior())


def stable_cascade() -> Any:
    """Make Stable Cascade: a first stage that makes 1/42-size latents of the text, and a second that enlarges them."""
    with seeded(49):
        prior = StableCascadeUNet(
            conditioning_dim=16, block_out_channels=(16,), num_attention_heads=(2,), down_num_layers_per_block=(1,),
            up_num_layers_per_block=(1,), clip_image_in_channels=16, clip_text_in_channels=WIDTH,
            clip_text_pooled_in_channels=WIDTH, switch_level=(False,), down_blocks_repeat_mappers=(1,),
            up_blocks_repeat_mappers=(1,), block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ), in_channels=4, out_channels=4,
        )  # fmt: skip
        decoder = StableCascadeUNet(
            conditioning_dim=16, block_out_channels=(16,), num_attention_heads=(2,), down_num_layers_per_block=(1,),
            up_num_layers_per_block=(1,), clip_text_pooled_in_channels=WIDTH, effnet_in_channels=4, patch_size=2,
            down_blocks_repeat_mappers=(1,), up_blocks_repeat_mappers=(1,), block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ), in_channels=4, out_channels=4, timestep_conditioning_type=("sca",),
        )  # fmt: skip
        vqgan = fill(PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8), out_block=0.01)
        words = make_tokenizer()
        return StableCascadeCombinedPipeline(
            tokenizer=words, text_encoder=make_clip(words, projects=True), decoder=fill(decoder),
            scheduler=DDPMWuerstchenScheduler(), vqgan=vqgan,
            prior_prior=fill(prior), prior_text_encoder=make_clip(words, projects=True), prior_tokenizer=words,
            prior_scheduler=DDPMWuerstchenScheduler(),
        )  # fmt: skip


PIPELINES = {
    "StableDiffusionPipeline": TinyPipeline(
        lambda: _stable_diffusion(StableDiffusionPipeline, 40), other_scheduler="DPMSolverMultistepScheduler"
    ),
    "StableDiffusionPAGPipeline": TinyPipeline(lambda: _stable_diffusion(StableDiffusionPAGPipeline, 40)),
    "StableDiffusionSAGPipeline": TinyPipeline(lambda: _stable_diffusion(StableDiffusionSAGPipeline, 40)),
    "LatentConsistencyModelPipeline": TinyPipeline(
        lambda: _stable_diffusion(LatentConsistencyModelPipeline, 41), embeds=True, negative=False
    ),
    "StableDiffusionXLPipeline": TinyPipeline(
        lambda: _stable_diffusion_xl(StableDiffusionXLPipeline, 42), other_scheduler="EulerAncestralDiscreteScheduler"
    ),
    "StableDiffusionXLPAGPipeline": TinyPipeline(lambda: _stable_diffusion_xl(StableDiffusionXLPAGPipeline, 42)),
    "IFPipeline": TinyPipeline(deep_floyd, (32, 32)),
    "Kandinsky3Pipeline": TinyPipeline(kandinsky3),
    "KandinskyCombinedPipeline": TinyPipeline(kandinsky),
    "KandinskyV22CombinedPipeline": TinyPipeline(kandinsky22),
    "StableCascadeCombinedPipeline": TinyPipeline(stable_cascade, (128, 128), guidance="prior_guidance_scale"),
}
