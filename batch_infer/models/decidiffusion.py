"""Load DeciDiffusion 1.0: Stable Diffusion with a UNet that diffusers' block lists cannot describe.

The checkpoint's pipeline.py never runs, and its stock UNet in unet/ is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch
from diffusers import Transformer2DModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from msgspec import Meta
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import silu

from batch_infer.errors import ModelError
from batch_infer.models.card import ModelCard
from batch_infer.models.loading import load_components, refuse_unmatched_weights
from batch_infer.models.stable_diffusion import VAE_AND_ENCODER, StableDiffusion
from batch_infer.models.untrusted import choose_weights, loading_errors, read_object

FOLDER = "flexible_unet"
CLASS_NAME = "FlexibleUNet2DConditionModel"
GROUPS = 32
"""Number of groups in every group normalization."""

Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(gt=0)]
Widths = Annotated[tuple[Size, ...], Meta(min_length=1)]
Skips = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class FlexibleUNetConfig:
    """The architecture, as defined under `configurations` in flexible_unet/config.json.

    Tuples have one entry per down or up block, in order of execution. The mid block has `mid_num_resnets` + 1 resnets.
    Keys that follow from these fields are checked but not stored.
    """

    in_channels: ClassVar[int] = 4

    sample_size: Size
    temb_dim: Size
    resnet_eps: Annotated[float, Meta(gt=0)]
    num_attention_heads: Size
    cross_attention_dim: Size
    down_blocks_in_channels: Widths
    down_blocks_out_channels: Widths
    down_blocks_num_attentions: tuple[Count, ...]
    down_blocks_num_resnets: tuple[Size, ...]
    mid_num_resnets: Count
    mid_num_attentions: Count
    up_blocks_num_attentions: tuple[Count, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any], source: object) -> FlexibleUNetConfig:
        """Parse the content of flexible_unet/config.json. Error messages name `source`.

        Keys outside `configurations` describe a stock UNet and are ignored. Raises ModelError for another class
        and, naming the key, if a key is missing, invalid or unknown or contradicts other keys.
        """
        settings: Any = config.get("configurations")
        if (name := config.get("_class_name")) != CLASS_NAME:
            raise ModelError(f"{source}: config.json describes a {name}, not a {CLASS_NAME}")
        try:
            result = msgspec.convert(settings, cls)
        except msgspec.ValidationError as error:
            raise ModelError(f"{source}: config.json is invalid under `configurations`: {error}") from error
        for key, reason in result._find_faults(settings):
            value = settings.get(key)
            raise ModelError(f"{source}: config.json has {key}={value!r} under `configurations`: {reason}")
        return result

    def _find_faults(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield each key that contradicts other keys or is unknown, with the reason."""
        heads, levels = self.num_attention_heads, len(self.down_blocks_in_channels)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != levels:
                yield field.name, f"down_blocks_in_channels has {levels} entries"
            if field.name.endswith("channels") and any(width % GROUPS or width % heads for width in value):
                yield field.name, f"widths must be divisible by {GROUPS} groups and {heads} attention heads"
        implied = self._implied_keys()
        for key, value in implied.items():
            if settings.get(key) != value:
                yield key, f"it must be {value} to match the other keys"
        for key in sorted(settings.keys() - implied.keys() - {field.name for field in fields(self)}):
            yield key, "this version does not know that key"

    def _implied_keys(self) -> dict[str, Any]:
        """Return the only valid value of each key that is constant or follows from others.

        Most keys follow because a skip must be popped at the size at which it was pushed.
        """
        widths, levels = self.down_blocks_out_channels, len(self.down_blocks_out_channels)
        return {
            "resnet_act_fn": "silu",
            "mix_block_in_forward": True,
            "down_blocks_in_channels": [self.down_blocks_in_channels[0], *widths[:-1]],
            "add_downsample": [True] * levels,
            "add_upsample_mid_block": True,
            "prev_output_channels": [widths[-1], *widths[:0:-1]],
            "up_blocks_num_resnets": [resnets + 1 for resnets in reversed(self.down_blocks_num_resnets)],
            "add_upsample": [True] * (levels - 1) + [False],
        }


class FlexibleUNet(nn.Module):
    """A UNet with the tensor names of the published checkpoint.

    Besides the order of layers, it differs from diffusers' UNet2DConditionModel in three ways. The mid block
    runs its first resnet twice. The output of a resnet becomes a skip before, not after, the transformer that follows.
    The last down block also halves the sides, and the mid block doubles them again before the first skip is popped.
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
        """Map sample (N, 4, h, w), timestep (N,) and text (N, tokens, cross_attention_dim) to (N, 4, h, w).

        h and w may be odd: halving rounds up.
        """
        temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        hidden = self.conv_in(sample)
        skips = [hidden]
        for block in self.down_blocks:
            hidden = block(hidden, temb, encoder_hidden_states, skips)
            skips.append(hidden)
        skips.pop()  # the output of the last block is not a skip
        hidden = self.mid_block(hidden, temb, encoder_hidden_states, skips)
        for block in self.up_blocks:
            hidden = block(hidden, temb, encoder_hidden_states, skips)
        return (self.conv_out(silu(self.conv_norm_out(hidden))),)

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values of the same input in one product, as in diffusers' UNets."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse_projections()
                module.set_processor(FusedAttnProcessor2_0())


class _Block(nn.Module):
    """Alternates resnets and transformers. If one kind outnumbers the other, its surplus comes last."""

    def __init__(self, config: FlexibleUNetConfig, inputs: Sequence[int], width: int, attentions: int) -> None:
        """`inputs` contains the input channels of each resnet. All resnets have `width` output channels."""
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
        # With diffusers' default name, the state dict would list these weights under two names.
        self.downsamplers = nn.ModuleList([Downsample2D(width, use_conv=True, name="op")])

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor, context: torch.Tensor, skips: Skips) -> torch.Tensor:
        for module in self.modules_list:
            hidden = _run(module, hidden, temb, context)
            if isinstance(module, ResnetBlock2D):
                skips.append(hidden)
        downsampled: torch.Tensor = self.downsamplers[0](hidden)
        return downsampled


class _MidBlock(_Block):
    def __init__(self, config: FlexibleUNetConfig) -> None:
        width = config.down_blocks_out_channels[-1]
        super().__init__(config, [width] * (config.mid_num_resnets + 1), width, config.mid_num_attentions)
        self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)])

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor, context: torch.Tensor, skips: Skips) -> torch.Tensor:
        hidden = _run(self.modules_list[0], hidden, temb, context)  # runs again in the loop, as it did in training
        for module in self.modules_list:
            hidden = _run(module, hidden, temb, context)
        return _upsample(self.upsamplers[0], hidden, skips)


class _UpBlock(_Block):
    def __init__(self, config: FlexibleUNetConfig, level: int) -> None:
        """`level` is the index of the down block whose skips this block pops, last skip first, and then its input."""
        widths, down_resnets = config.down_blocks_out_channels, config.down_blocks_num_resnets[level]
        width, width_below = widths[level], widths[min(level + 1, len(widths) - 1)]
        hidden = [width_below] + [width] * down_resnets
        skips = [width] * down_resnets + [config.down_blocks_in_channels[level]]
        inputs = [channels + skip for channels, skip in zip(hidden, skips, strict=True)]
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
    """Upsample to the size of the next skip: each side doubles, minus one element if the skip's side is odd."""
    upsampled: torch.Tensor = module(hidden, skips[-1].shape[2:])
    return upsampled


class DeciDiffusion(StableDiffusion):
    """A loaded DeciDiffusion 1.0 checkpoint."""

    @classmethod
    def load_modules(cls, card: ModelCard, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        folder = card.path / FOLDER
        config = FlexibleUNetConfig.read(read_object(folder / "config.json", card.name), folder)
        with torch.device("meta"):  # allocate no initial weights
            unet = FlexibleUNet(config)
        with loading_errors(folder):
            files = choose_weights(folder.glob("*"), card.variant)
            weights = {name: tensor.to(dtype) for file in files for name, tensor in load_file(file).items()}
            expected = unet.state_dict()
            refuse_unmatched_weights(folder, expected.keys() - weights.keys(), weights.keys() - expected.keys())
            unet.load_state_dict(weights, assign=True)
        # The pipeline gets no UNet, because it accepts only the UNet class in model_index.json.
        return unet.requires_grad_(False).eval(), {"unet": None, **load_components(VAE_AND_ENCODER, card, dtype)}
