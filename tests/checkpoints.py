"""Tiny random checkpoints in the layouts of Stable Diffusion 1.x and 2.x, for tests that need another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from batch_infer.models import DEMO_MODEL

VIEW = 32
"""Side of the square that the tiny checker looks at."""
NOISE_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def save_sd1(folder: Path) -> Path:
    """Stable Diffusion 1.x: noise prediction, convolutions around its attention, PNDM, a checker of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = _unet(attention_head_dim=4, use_linear_projection=False, cross_attention_dim=32)
        text_encoder = _text_encoder(hidden_size=32, num_hidden_layers=2, hidden_act="quick_gelu")
        vae, checker = _vae(), _checker()
    # from_config: the class does not take clip_sample, but the real checkpoint's file holds it.
    scheduler = PNDMScheduler.from_config({**NOISE_SCHEDULE, "skip_prk_steps": True, "clip_sample": False})
    parts = (vae, text_encoder, _tokenizer(), unet, scheduler)
    bare = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    _set_thresholds(checker, probe_images(64), _renderings(bare, 64))
    return _save(StableDiffusionPipeline(*parts, checker, _processor()), folder)


def save_sd2(folder: Path) -> Path:
    """Stable Diffusion 2.x: v-prediction, linear layers around its attention, DDIM, no checker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        unet = _unet(attention_head_dim=[2, 4], use_linear_projection=True, cross_attention_dim=48)
        text_encoder = _text_encoder(hidden_size=48, num_hidden_layers=3, hidden_act="gelu")
        vae = _vae()
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, prediction_type="v_prediction")
    pipe = StableDiffusionPipeline(
        vae, text_encoder, _tokenizer(), unet, scheduler, None, _processor(), requires_safety_checker=False
    )
    return _save(pipe, folder)


def probe_images(count: int, height: int = VIEW, width: int = VIEW) -> list[np.ndarray]:
    """Pictures (H, W, 3) uint8 of soft coloured blots, no two alike."""
    random = np.random.default_rng(0)
    blots = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(blot).resize((width, height), Image.Resampling.BICUBIC)) for blot in blots]


def amend(path: Path, **values: Any) -> None:
    """Set values in a JSON file; None takes a key away."""
    content = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")


def _save(pipe: StableDiffusionPipeline, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    # Without torchvision the processor's class has another name; released checkpoints hold the plain one.
    amend(folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    return folder


def _unet(**architecture: Any) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        **architecture,
    )
    with torch.no_grad():
        unet.conv_out.weight *= 3  # outputs near unit variance, as a trained one's are
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                weight *= 4  # so that the prompt, and with it guidance, moves the image
    return unet.eval()


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
    )
    return vae.eval()


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DEMO_MODEL / "tokenizer")


def _text_encoder(**architecture: Any) -> CLIPTextModel:
    tokenizer = _tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        intermediate_size=64,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **architecture,
    )
    return CLIPTextModel(config).eval()


def _processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": VIEW}, crop_size={"height": VIEW, "width": VIEW})


def _renderings(pipe: StableDiffusionPipeline, count: int) -> list[np.ndarray]:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipe(["a red circle"] * count, num_inference_steps=4, guidance_scale=1.0, latents=noise).images
    return [np.asarray(image) for image in images]


def _checker() -> StableDiffusionSafetyChecker:
    """A checker with random concepts."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": VIEW,
        "patch_size": 8,
    }
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    with torch.no_grad():
        for concepts in (checker.concept_embeds, checker.special_care_embeds):
            concepts.copy_(torch.randn(concepts.shape))
    return checker


@torch.no_grad()
def _set_thresholds(checker: StableDiffusionSafetyChecker, *kinds: list[np.ndarray]) -> None:
    """So high that of each kind of image some are flagged and some are not."""
    for name, quantile in (("concept_embeds", 0.95), ("special_care_embeds", 0.9)):
        concepts = normalize(getattr(checker, name)).T
        found = [(_embed(checker, images) @ concepts).quantile(quantile, dim=0) for images in kinds]
        getattr(checker, f"{name}_weights").copy_(torch.stack(found).amax(dim=0))


def _embed(checker: StableDiffusionSafetyChecker, images: list[np.ndarray]) -> torch.Tensor:
    pixels = _processor()(images, return_tensors="pt").pixel_values
    return normalize(checker.visual_projection(checker.vision_model(pixels)[1]))
