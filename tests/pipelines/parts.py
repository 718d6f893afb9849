"""Parts of tiny random pipelines: tokenizers, decoders, and weights that respond to every input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    VQModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

WIDTH = 16
"""Width of every text encoder."""
VOCABULARY = 300
"""Number of token embeddings of text encoders that read bytes: enough for `make_byte_tokenizer`."""
CHAT = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
"""Chat template for messages whose content is a text."""
LAST_TEXT = "<{{ messages[-1]['content'][0]['text'] }}>"
"""Chat template for messages whose content is a list of parts: only the last message."""
LAST_WORDS = "<{{ messages[-1]['content'][0]['text'][-200:] }}>"
"""Like LAST_TEXT, but only the end of a long message."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class TinyPipeline:
    """How to build a tiny pipeline, and what its `__call__` supports."""

    build: Callable[[], Any]
    size: tuple[int, int] = (64, 64)
    """Height and width of its images."""
    guidance: str | None = "guidance_scale"
    """The parameter of `__call__` for a row's guidance scale. None if the scale would have no effect."""
    embeds: bool = False
    """Whether the guidance scale is an input of the denoiser, which then needs no second pass."""
    negative: bool = True
    """Whether `__call__` has a negative prompt."""
    steps: tuple[int, ...] = (2, 3, 4, 5)
    """Numbers of steps that it supports, of those up to 5."""
    other_scheduler: str | None = None
    """Name of a second scheduler that the pipeline supports."""
    is_saved: bool = True
    """Whether a loaded copy renders the same images. False if an attribute is set after construction."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator for a block, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def fill(network: Network, gain: float = 1.0, **gains: float) -> Network:
    """Fill a network with random weights that keep the size of activations, and return it in evaluation mode.

    Default values are unsuitable: norms are all one, some output layers are zero, some parameters are uninitialised
    memory, and language models return values near zero. `gains` are factors for parameters whose name contains the key.
    """
    for name, parameter in network.named_parameters():
        factor = gain
        for part, value in gains.items():
            if part in name:
                factor *= value
        if parameter.ndim < 2:
            is_scale = name.endswith(("weight", "gamma"))
            parameter.copy_(float(is_scale) + 0.2 * torch.randn(parameter.shape))
        else:
            fan_in = parameter[0].numel()
            parameter.copy_(factor * torch.randn(parameter.shape) / fan_in**0.5)
    return network.eval()


def make_kl(latent_channels: int = 4, levels: int = 4, **settings: Any) -> AutoencoderKL:
    """Make an image decoder that enlarges latents by 2 ** (levels - 1)."""
    return fill(
        AutoencoderKL(
            block_out_channels=[8] * levels, down_block_types=["DownEncoderBlock2D"] * levels, layers_per_block=1,
            up_block_types=["UpDecoderBlock2D"] * levels, norm_num_groups=4, latent_channels=latent_channels,
            **settings,
        )
    )  # fmt: skip


def make_flux2_vae() -> AutoencoderKLFlux2:
    """Make FLUX.2's decoder: 16 channels per latent pixel of 16x16 image pixels."""
    return fill(
        AutoencoderKLFlux2(
            block_out_channels=[8] * 4, down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=1,
            up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=4, latent_channels=4,
        )
    )  # fmt: skip


def make_qwen_vae() -> AutoencoderKLQwenImage:
    """Make Qwen-Image's decoder, which also decodes videos. It enlarges latents by 8."""
    return fill(
        AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4,
        )
    )  # fmt: skip


def make_dc(levels: int, **gains: float) -> AutoencoderDC:
    """Make a deep compression decoder, with linear attention in its deepest level."""
    blocks = ["ResBlock"] * (levels - 1) + ["EfficientViTBlock"]
    scales = [()] * (levels - 1) + [(5,)]
    return fill(
        AutoencoderDC(
            latent_channels=4, attention_head_dim=4, encoder_block_types=blocks, decoder_block_types=blocks,
            encoder_block_out_channels=[8] * levels, decoder_block_out_channels=[8] * levels,
            encoder_layers_per_block=[1] * levels, decoder_layers_per_block=[1] * levels,
            encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales, upsample_block_type="interpolate",
            downsample_block_type="conv", scaling_factor=0.4,
        ),
        **gains,
    )  # fmt: skip


def make_movq() -> VQModel:
    """Make Kandinsky's decoder, which normalises by the latents and enlarges them by 8."""
    return fill(
        VQModel(
            block_out_channels=[32] * 4, down_block_types=["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
            up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3, latent_channels=4, layers_per_block=1,
            norm_num_groups=4, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
        ),
        conv_out=0.4,
    )  # fmt: skip


def make_flow(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **settings})


def make_byte_tokenizer(length: int, chat: str | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are bytes."""
    words = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)
    wrapped.chat_template = chat
    return wrapped
