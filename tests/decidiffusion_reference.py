"""A reference implementation of DeciDiffusion for its tests. It shares no model or sampler code with the package.

It renders one row at a time. The UNet consists of torch functions on tensors from a dictionary, without modules, and
the sampler is written out, without a scheduler class.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.nn.functional import conv2d, gelu, group_norm, layer_norm, linear, silu
from transformers import CLIPTextModel, CLIPTokenizer

from batch_infer.records import PromptRequest

LISTING = {
    "down_blocks.0": "R(320>320) R(320>320)",
    "down_blocks.1": "R(320>640) T R(640>640)",
    "down_blocks.2": "R(640>1280) T T T",
    "mid_block": "R(1280>1280) T R(1280>1280) T R(1280>1280) R(1280>1280) R(1280>1280)",
    "up_blocks.0": "R(2560>1280) T R(1920>1280) T T T T T",
    "up_blocks.1": "R(1920>640) T R(1280>640) T R(960>640) T",
    "up_blocks.2": "R(960>320) R(640>320) R(640>320)",
}
"""The published layers: R is a resnet with its channels, T a transformer. Tiny models have the same order."""
DOWN, UP = ("down_blocks.0", "down_blocks.1", "down_blocks.2"), ("up_blocks.0", "up_blocks.1", "up_blocks.2")
TRAINED_STEPS = 1000


def layers(block: str) -> list[tuple[str, str]]:
    """Return a block's layers as (R or T, prefix of the tensor names)."""
    return [(letter, f"{block}.modules_list.{k}") for k, letter in enumerate(re.findall("[RT]", LISTING[block]))]


@dataclass(frozen=True)
class ReferenceUNet:
    """Evaluates the UNet with the tensors of its file, by name."""

    tensors: dict[str, torch.Tensor]
    heads: int

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Predict from sample (N, 4, h, w), timestep (N,) and text (N, tokens, width)."""
        time = self.embed_time(timestep)
        x = self.conv("conv_in", sample)
        skips, sizes = [x], []
        for block in DOWN:
            for kind, name in layers(block):
                if kind == "R":
                    x = self.resnet(name, x, time)
                    skips.append(x)
                else:
                    x = self.transformer(name, x, text)
            sizes.append(x.shape[2:])
            x = self.conv(f"{block}.downsamplers.0.conv", x, stride=2)
            if block != DOWN[-1]:
                skips.append(x)
        x = self.resnet("mid_block.modules_list.0", x, time)
        for kind, name in layers("mid_block"):
            x = self.resnet(name, x, time) if kind == "R" else self.transformer(name, x, text)
        x = self.conv("mid_block.upsamplers.0.conv", double_sides(x, sizes.pop()))
        for block in UP:
            for kind, name in layers(block):
                if kind == "R":
                    x = self.resnet(name, torch.cat([x, skips.pop()], 1), time)
                else:
                    x = self.transformer(name, x, text)
            if block != UP[-1]:
                x = self.conv(f"{block}.upsamplers.0.conv", double_sides(x, sizes.pop()))
        assert not skips and not sizes
        return self.conv("conv_out", silu(self.group_norm("conv_norm_out", x, 1e-5)))

    def embed_time(self, timestep: torch.Tensor) -> torch.Tensor:
        half = self.tensors["conv_in.weight"].shape[0] // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angles = timestep.float()[:, None] * frequencies[None, :]
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.tensors["conv_in.weight"].dtype)
        return self.linear("time_embedding.linear_2", silu(self.linear("time_embedding.linear_1", waves)))

    def resnet(self, name: str, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        h = self.conv(f"{name}.conv1", silu(self.group_norm(f"{name}.norm1", x, 1e-5)))
        h = h + self.linear(f"{name}.time_emb_proj", silu(time))[:, :, None, None]
        h = self.conv(f"{name}.conv2", silu(self.group_norm(f"{name}.norm2", h, 1e-5)))
        if f"{name}.conv_shortcut.weight" in self.tensors:
            x = self.conv(f"{name}.conv_shortcut", x)
        return x + h

    def transformer(self, name: str, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        block = f"{name}.transformer_blocks.0"
        h = self.conv(f"{name}.proj_in", self.group_norm(f"{name}.norm", x, 1e-6))
        h = h.flatten(2).transpose(1, 2)
        normed = self.layer_norm(f"{block}.norm1", h)
        h = h + self.attention(f"{block}.attn1", normed, normed)
        h = h + self.attention(f"{block}.attn2", self.layer_norm(f"{block}.norm2", h), text)
        value, gate = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", h)).chunk(2, dim=-1)
        h = h + self.linear(f"{block}.ff.net.2", value * gelu(gate))
        h = h.transpose(1, 2).reshape(n, channels, height, width)
        return x + self.conv(f"{name}.proj_out", h)

    def attention(self, name: str, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.linear(f"{name}.{to}", of).reshape(*of.shape[:-1], self.heads, -1)
                   for to, of in (("to_q", x), ("to_k", context), ("to_v", context)))  # fmt: skip
        weights = torch.einsum("nqhc,nkhc->nhqk", q, k) / math.sqrt(q.shape[-1])
        return self.linear(f"{name}.to_out.0", torch.einsum("nhqk,nkhc->nqhc", weights.softmax(-1), v).flatten(2))

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = self.tensors[f"{name}.weight"]
        return conv2d(x, weight, self.tensors[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def group_norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps)

    def layer_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])


def double_sides(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Double both sides by repeating pixels, and crop to `size`, the size before halving, which rounds up."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, : size[0], : size[1]]


def alphas_bar() -> np.ndarray:
    """Return the cumulative product of alphas at each training step. The last is zero.

    Nichol & Dhariwal, arXiv 2102.09672, eq. 17 (cosine); Lin et al., arXiv 2305.08891, algorithm 1 (zero terminal SNR).
    """
    squared_cosine = [math.cos((k / TRAINED_STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
    betas = [min(1 - squared_cosine[k + 1] / squared_cosine[k], 0.999) for k in range(TRAINED_STEPS)]
    roots = np.sqrt(np.cumprod(1 - np.array(betas)))
    return np.asarray(((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2)


def apply_guidance(
    conditional: torch.Tensor, unconditional: torch.Tensor, scale: float, rescale: float
) -> torch.Tensor:
    """Apply guidance, and rescale it by the standard deviation (Lin et al., arXiv 2305.08891, section 3.4)."""
    combined = unconditional + scale * (conditional - unconditional)
    rescaled = combined * (conditional.std() / combined.std())
    return rescale * rescaled + (1 - rescale) * combined


@dataclass(frozen=True)
class ReferencePipeline:
    """Renders rows with the components of a checkpoint."""

    unet: ReferenceUNet
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL

    @classmethod
    def open(cls, folder: Path) -> ReferencePipeline:
        (file,) = (folder / "flexible_unet").glob("*.safetensors")
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
        config: dict[str, Any] = json.loads((folder / "flexible_unet" / "config.json").read_text("utf-8"))
        return cls(
            ReferenceUNet(tensors, config["configurations"]["num_attention_heads"]),
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        )

    @torch.inference_mode()
    def render(self, request: PromptRequest) -> np.ndarray:
        """Return the row's image (H, W, 3) uint8."""
        image = self.vae.decode(self.denoise(request) / 0.18215).sample[0]
        image = (image / 2 + 0.5).clamp(0, 1)
        return np.asarray((image * 255).round().to(torch.uint8).permute(1, 2, 0))

    def denoise(self, request: PromptRequest) -> torch.Tensor:
        """Run DDIM without noise (arXiv 2010.02502, eq. 12) on v-predictions (arXiv 2202.00512, appendix D)."""
        params, alphas = request.params, alphas_bar()
        generator = torch.Generator("cpu").manual_seed(request.seed)
        x = torch.randn(1, 4, params.height // 8, params.width // 8, generator=generator)
        text, negative = self.encode(request.prompt), self.encode(request.negative_prompt or "")
        trailing = np.arange(TRAINED_STEPS, 0, -TRAINED_STEPS / params.num_inference_steps).round().astype(int) - 1
        for t in trailing:
            timestep = torch.tensor([float(t)])
            v = self.unet(x, timestep, text)
            if params.guidance_scale > 1:
                unconditional = self.unet(x, timestep, negative)
                v = apply_guidance(v, unconditional, params.guidance_scale, params.guidance_rescale)
            # The next timestep is lower by a whole number of training steps, but not below 0.
            next_t = max(t - TRAINED_STEPS // params.num_inference_steps, 0)
            image = math.sqrt(alphas[t]) * x - math.sqrt(1 - alphas[t]) * v
            noise = math.sqrt(alphas[t]) * v + math.sqrt(1 - alphas[t]) * x
            x = math.sqrt(alphas[next_t]) * image + math.sqrt(1 - alphas[next_t]) * noise
        return x

    def encode(self, text: str) -> torch.Tensor:
        tokens = self.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        embedding: torch.Tensor = self.text_encoder(tokens.input_ids)[0]
        return embedding
