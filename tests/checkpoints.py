"""Tiny random checkpoints of Stable Diffusion 1.x, 2.x, latent consistency models and DeciDiffusion for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from batch_infer.models import DEMO_MODEL
from batch_infer.models.decidiffusion import FlexibleUNet, FlexibleUNetConfig

CHECKER_SIDE = 32
"""Side of the tiny checker's input, in pixels."""
NOISE_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def save_sd1(folder: Path) -> Path:
    """Save Stable Diffusion 1.x: noise prediction, convolutions around attention, PNDM, and a safety checker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = make_unet(attention_head_dim=4, use_linear_projection=False, cross_attention_dim=32)
        text_encoder = make_text_encoder(hidden_size=32, num_hidden_layers=2, hidden_act="quick_gelu")
        vae, checker = make_vae(), _checker()
    # With from_config, because the constructor does not accept clip_sample, which released checkpoints contain.
    scheduler = PNDMScheduler.from_config({**NOISE_SCHEDULE, "skip_prk_steps": True, "clip_sample": False})
    parts = (vae, text_encoder, make_tokenizer(), unet, scheduler)
    bare = StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
    _set_thresholds(checker, probe_images(64), _renderings(bare, 64))
    return _save(StableDiffusionPipeline(*parts, checker, _processor()), folder)


def save_sd2(folder: Path) -> Path:
    """Save Stable Diffusion 2.x: v-prediction, linear layers around attention, DDIM, no checker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        unet = make_unet(attention_head_dim=[2, 4], use_linear_projection=True, cross_attention_dim=48)
        text_encoder = make_text_encoder(hidden_size=48, num_hidden_layers=3, hidden_act="gelu")
        vae = make_vae()
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, prediction_type="v_prediction")
    pipe = StableDiffusionPipeline(
        vae, text_encoder, make_tokenizer(), unet, scheduler, None, _processor(), requires_safety_checker=False
    )
    return _save(pipe, folder)


def save_lcm(folder: Path) -> Path:
    """Save a latent consistency model: Stable Diffusion 1.x with embedded guidance, few steps, no checker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        unet = make_unet(attention_head_dim=4, cross_attention_dim=32, time_cond_proj_dim=16)
        text_encoder = make_text_encoder(hidden_size=32, num_hidden_layers=2, hidden_act="quick_gelu")
        vae = make_vae()
    scheduler = LCMScheduler(**{**NOISE_SCHEDULE, "set_alpha_to_one": True, "steps_offset": 0})
    pipe = LatentConsistencyModelPipeline(
        vae, text_encoder, make_tokenizer(), unet, scheduler, None, _processor(), requires_safety_checker=False
    )
    return _save(pipe, folder)


DECIDIFFUSION: dict[str, Any] = {
    "sample_size": 64,
    "temb_dim": 1280,
    "resnet_eps": 1e-5,
    "resnet_act_fn": "silu",
    "num_attention_heads": 8,
    "cross_attention_dim": 768,
    "mix_block_in_forward": True,
    "down_blocks_in_channels": [320, 320, 640],
    "down_blocks_out_channels": [320, 640, 1280],
    "down_blocks_num_attentions": [0, 1, 3],
    "down_blocks_num_resnets": [2, 2, 1],
    "add_downsample": [True, True, True],
    "mid_num_resnets": 4,
    "mid_num_attentions": 2,
    "add_upsample_mid_block": True,
    "prev_output_channels": [1280, 1280, 640],
    "up_blocks_num_attentions": [6, 3, 0],
    "up_blocks_num_resnets": [2, 3, 3],
    "add_upsample": [True, True, False],
}
"""`configurations` of the published flexible_unet/config.json."""
OUTER = {"_class_name": "FlexibleUNet2DConditionModel", "block_out_channels": [320, 640, 1280, 1280]}
"""Keys outside `configurations`. `block_out_channels` describes a stock UNet and must be ignored."""
TINY_DECIDIFFUSION = DECIDIFFUSION | {
    "sample_size": 8,
    "temb_dim": 48,
    "num_attention_heads": 4,
    "cross_attention_dim": 32,
    "down_blocks_in_channels": [32, 32, 64],
    "down_blocks_out_channels": [32, 64, 96],
    "prev_output_channels": [96, 96, 64],
}


def save_decidiffusion(folder: Path) -> Path:
    """Save DeciDiffusion 1.0: its UNet in half precision, v-prediction from pure noise, and a checker.

    Like the published repository, the folder also contains files that must not be used: `unet/`, here without a valid
    network, and `pipeline.py`, which here ends the process.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        unet = _flexible_unet()
        text_encoder = make_text_encoder(hidden_size=32, num_hidden_layers=2, hidden_act="quick_gelu")
        vae, checker = make_vae(), _checker()
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    pipe = StableDiffusionPipeline(vae, text_encoder, make_tokenizer(), None, scheduler, checker, _processor())
    _save(pipe, folder)
    amend(folder / "model_index.json", _class_name="DeciDiffusionPipeline", unet=["diffusers", "UNet2DConditionModel"])
    flexible, stock = folder / "flexible_unet", folder / "unet"
    flexible.mkdir()
    stock.mkdir()
    (flexible / "config.json").write_text(json.dumps({**OUTER, "configurations": TINY_DECIDIFFUSION}), "utf-8")
    weights = {name: tensor.half() for name, tensor in unet.state_dict().items()}
    save_file(weights, flexible / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (stock / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "block_out_channels": "nonsense"}')
    (stock / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    (folder / "pipeline.py").write_text('raise SystemExit("code of the checkpoint was run")\n', "utf-8")
    return folder


def probe_images(count: int, height: int = CHECKER_SIDE, width: int = CHECKER_SIDE) -> list[np.ndarray]:
    """Return `count` different images (H, W, 3) uint8 of blurred colour patches."""
    random = np.random.default_rng(0)
    grids = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)) for grid in grids]


def amend(path: Path, **values: Any) -> None:
    """Set values in a JSON file; None removes a key."""
    content = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), "utf-8")


def _save(pipe: DiffusionPipeline, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    # Without torchvision the processor's class has another name than in released checkpoints.
    amend(folder / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    return folder


def make_unet(**architecture: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(**settings | architecture)
    with torch.no_grad():
        unet.conv_out.weight.mul_(3)  # outputs near unit variance, as after training
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                weight.mul_(4)  # so that the prompt, and with it guidance, changes the image
            if "add_embedding" in name or "cond_proj" in name:
                weight.mul_(4)  # so that these embeddings change it too
    return unet.eval()


@torch.no_grad()
def _flexible_unet() -> FlexibleUNet:
    unet = FlexibleUNet(FlexibleUNetConfig.read({**OUTER, "configurations": TINY_DECIDIFFUSION}, "the tiny model"))
    for name, weight in unet.named_parameters():
        if weight.ndim == 1:
            weight.add_(0.2 * torch.randn(weight.shape))  # so that all norms and biases differ
        if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
            weight.mul_(4)  # so that the prompt, and with it guidance, changes the image
    unet.conv_out.weight.mul_(3)  # outputs near unit variance, as after training
    return unet.eval()


def make_vae(**settings: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
        **settings,
    )
    return vae.eval()


def make_tokenizer(**settings: Any) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DEMO_MODEL / "tokenizer", **settings)


def make_text_encoder(kind: Any = CLIPTextModel, **architecture: Any) -> Any:
    tokenizer = make_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "projection_dim": 32,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    return kind(CLIPTextConfig(**settings | architecture)).eval()


def _processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": CHECKER_SIDE}, crop_size={"height": CHECKER_SIDE, "width": CHECKER_SIDE}
    )


def _renderings(pipe: StableDiffusionPipeline, count: int) -> list[np.ndarray]:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipe(["a red circle"] * count, num_inference_steps=4, guidance_scale=1.0, latents=noise).images
    return [np.asarray(image) for image in images]


def _checker() -> StableDiffusionSafetyChecker:
    """Make a checker with random concepts."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": CHECKER_SIDE,
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
    """Set thresholds that flag some images of each kind but not all."""
    for name, quantile in (("concept_embeds", 0.95), ("special_care_embeds", 0.9)):
        concepts = normalize(getattr(checker, name)).T
        thresholds = [(_embed(checker, images) @ concepts).quantile(quantile, dim=0) for images in kinds]
        getattr(checker, f"{name}_weights").copy_(torch.stack(thresholds).amax(dim=0))


def _embed(checker: StableDiffusionSafetyChecker, images: list[np.ndarray]) -> torch.Tensor:
    pixels = _processor()(images, return_tensors="pt").pixel_values
    return normalize(checker.visual_projection(checker.vision_model(pixels)[1]))
