"""DeciDiffusion's UNet: Stable Diffusion's building blocks, in an order that diffusers' lists of them cannot tell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

import torch
from diffusers import Transformer2DModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.functional import silu

from batch_infer.models.decidiffusion_config import GROUPS, FlexibleUNetConfig

Skips = list[torch.Tensor]


class FlexibleUNet(nn.Module):
    """The denoiser of DeciDiffusion, with the published checkpoint's names of tensors.

    Beside the order of its layers it differs from diffusers' UNet2DConditionModel in three things: the mid block runs
    its first resnet twice; a skip is what a resnet gives, before the transformer that follows it; and the last down
    block halves the sides once more, which no skip sees and the mid block undoes.
    """

    def __init__(self, config: FlexibleUNetConfig) -> None:
        super().__init__()
        self.config = config
        stem, width = config.down_blocks_in_channels[0], config.down_blocks_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, stem, 3, padding=1)
        self.time_proj = Timesteps(stem, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(stem, config.temb_dim)
        levels = range(len(config.down_blocks_out_channels))
        self.down_blocks = nn.ModuleList(_DownBlock(config, level) for level in levels)
        self.mid_block = _MidBlock(config)
        self.up_blocks = nn.ModuleList(_UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(GROUPS, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: Literal[False] = False,
    ) -> tuple[torch.Tensor]:
        """Called as diffusers' UNets are: (N, 4, h, w), (N,) and (N, tokens, cross_attention_dim) to (N, 4, h, w).

        h and w may be any; where a side is odd, halving rounds it up.
        """
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        hidden = self.conv_in(sample)
        skips = [hidden]
        for block in self.down_blocks:
            hidden = block(hidden, temb, encoder_hidden_states, skips)
            skips.append(hidden)
        skips.pop()  # what the last block halved is no skip
        hidden = self.mid_block(hidden, temb, encoder_hidden_states, skips)
        for block in self.up_blocks:
            hidden = block(hidden, temb, encoder_hidden_states, skips)
        return (self.conv_out(silu(self.conv_norm_out(hidden))),)

    def fuse_qkv_projections(self) -> None:
        """As diffusers' UNets do: one product for queries, keys and values that come of the same input."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse_projections()
                module.set_processor(FusedAttnProcessor2_0())


class _Block(nn.Module):
    """Resnets and transformers in one list, one of each in turn and then those that are left."""

    def __init__(self, config: FlexibleUNetConfig, inputs: Sequence[int], width: int, attentions: int) -> None:
        """`inputs` are the channels that each resnet takes, `width` those that each gives."""
        super().__init__()
        heads = config.num_attention_heads
        resnets = [
            ResnetBlock2D(
                in_channels=channels, out_channels=width, temb_channels=config.temb_dim, groups=GROUPS,
                eps=config.resnet_eps,
            )
            for channels in inputs
        ]  # fmt: skip
        transformers = [
            Transformer2DModel(
                heads, width // heads, in_channels=width, norm_num_groups=GROUPS,
                cross_attention_dim=config.cross_attention_dim,
            )
            for _ in range(attentions)
        ]  # fmt: skip
        pairs = zip_longest(resnets, transformers)
        self.modules_list = nn.ModuleList(module for pair in pairs for module in pair if module is not None)


class _DownBlock(_Block):
    def __init__(self, config: FlexibleUNetConfig, level: int) -> None:
        width, resnets = config.down_blocks_out_channels[level], config.down_blocks_num_resnets[level]
        inputs = [config.down_blocks_in_channels[level]] + [width] * (resnets - 1)
        super().__init__(config, inputs, width, config.down_blocks_num_attentions[level])
        # By diffusers' usual name the module would hold its weights under two.
        self.downsamplers = nn.ModuleList([Downsample2D(width, use_conv=True, name="op")])

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor, context: torch.Tensor, skips: Skips) -> torch.Tensor:
        for module in self.modules_list:
            hidden = _run(module, hidden, temb, context)
            if isinstance(module, ResnetBlock2D):
                skips.append(hidden)
        halved: torch.Tensor = self.downsamplers[0](hidden)
        return halved


class _MidBlock(_Block):
    def __init__(self, config: FlexibleUNetConfig) -> None:
        width = config.down_blocks_out_channels[-1]
        super().__init__(config, [width] * (config.mid_num_resnets + 1), width, config.mid_num_attentions)
        self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)])

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor, context: torch.Tensor, skips: Skips) -> torch.Tensor:
        hidden = _run(self.modules_list[0], hidden, temb, context)  # and once more in the loop, as it was trained
        for module in self.modules_list:
            hidden = _run(module, hidden, temb, context)
        return _upsample(self.upsamplers[0], hidden, skips)


class _UpBlock(_Block):
    def __init__(self, config: FlexibleUNetConfig, level: int) -> None:
        """`level` is that of the down block whose skips are popped here, last first."""
        widths, further = config.down_blocks_out_channels, config.down_blocks_num_resnets[level]
        width, below = widths[level], widths[min(level + 1, len(widths) - 1)]
        skips = [width] * further + [config.down_blocks_in_channels[level]]
        inputs = [before + skip for before, skip in zip([below] + [width] * further, skips, strict=True)]
        super().__init__(config, inputs, width, config.up_blocks_num_attentions[-1 - level])
        self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)] if level else [])

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor, context: torch.Tensor, skips: Skips) -> torch.Tensor:
        for module in self.modules_list:
            if isinstance(module, ResnetBlock2D):
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = _run(module, hidden, temb, context)
        return _upsample(self.upsamplers[0], hidden, skips) if self.upsamplers else hidden


def _run(module: nn.Module, hidden: torch.Tensor, temb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    if isinstance(module, ResnetBlock2D):
        output: torch.Tensor = module(hidden, temb)
    else:
        (output,) = module(hidden, context, return_dict=False)
    return output


def _upsample(module: nn.Module, hidden: torch.Tensor, skips: Skips) -> torch.Tensor:
    """To the size of the skip that is popped next: to twice the size, or to one less where an odd side was halved."""
    doubled: torch.Tensor = module(hidden, skips[-1].shape[2:])
    return doubled
