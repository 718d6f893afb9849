"""The architecture of DeciDiffusion's UNet, as flexible_unet/config.json tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from batch_infer.errors import ModelError

CLASS_NAME = "FlexibleUNet2DConditionModel"
GROUPS = 32
"""Of every group normalisation."""


@dataclass(frozen=True, slots=True)
class FlexibleUNetConfig:
    """What decides the architecture, by its keys under `configurations` in flexible_unet/config.json.

    Lists have an entry for each down or up block, in the order in which these are run. The mid block has one resnet
    more than `mid_num_resnets`. Keys that follow from the ones here are compared with them, and not kept.
    """

    sample_size: int
    temb_dim: int
    resnet_eps: float
    num_attention_heads: int
    cross_attention_dim: int
    down_blocks_in_channels: tuple[int, ...]
    down_blocks_out_channels: tuple[int, ...]
    down_blocks_num_attentions: tuple[int, ...]
    down_blocks_num_resnets: tuple[int, ...]
    mid_num_resnets: int
    mid_num_attentions: int
    up_blocks_num_attentions: tuple[int, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any], place: object) -> FlexibleUNetConfig:
        """From the content of a flexible_unet/config.json; `place` says in errors where it lies.

        The file's outer keys are those of a stock UNet, and say nothing of this one. Raises ModelError, which names
        the key, for what is missing, is not known, or does not go together.
        """
        if (name := config.get("_class_name")) != CLASS_NAME:
            raise ModelError(f"{place}: config.json is that of a {name}, and not of a {CLASS_NAME}")
        told = config.get("configurations")
        if not isinstance(told, dict):
            raise ModelError(f"{place}: config.json has no `configurations`, which tell this UNet's architecture")
        values = {field.name: _read(told, field.name, str(field.type), place) for field in fields(cls)}
        found = cls(**values)
        _refuse_impossible(found, place)
        implied = _implied(found)
        for key, value in implied.items():
            if (said := _get(told, key, place)) != value:
                raise _odd(place, key, said, f"with the other keys it has to be {value}")
        for key in sorted(told.keys() - values.keys() - implied.keys()):
            raise _odd(place, key, told[key], "this version does not know that key")
        return found

    @property
    def in_channels(self) -> int:
        """Channels of the latents."""
        return 4


def _implied(config: FlexibleUNetConfig) -> dict[str, Any]:
    """What the remaining keys must say, so that each skip is popped at the size at which it was pushed."""
    widths, levels = config.down_blocks_out_channels, len(config.down_blocks_out_channels)
    return {
        "resnet_act_fn": "silu",
        "mix_block_in_forward": True,
        "down_blocks_in_channels": [config.down_blocks_in_channels[0], *widths[:-1]],
        "add_downsample": [True] * levels,
        "add_upsample_mid_block": True,
        "prev_output_channels": [widths[-1], *widths[:0:-1]],
        "up_blocks_num_resnets": [resnets + 1 for resnets in reversed(config.down_blocks_num_resnets)],
        "add_upsample": [True] * (levels - 1) + [False],
    }


def _refuse_impossible(config: FlexibleUNetConfig, place: object) -> None:
    """Raises ModelError for numbers of which no network can be made."""
    levels, heads = len(config.down_blocks_in_channels), config.num_attention_heads
    for field in fields(config):
        key, value = field.name, getattr(config, field.name)
        entries = value if isinstance(value, tuple) else (value,)
        if isinstance(value, tuple) and len(value) != levels:
            raise _odd(place, key, value, f"down_blocks_in_channels has {levels} entries")
        may_be_none = key.endswith("num_attentions") or key == "mid_num_resnets"
        if any(entry < 0 or (entry == 0 and not may_be_none) for entry in entries):
            raise _odd(place, key, value, "that is too little")
        if key.endswith("channels") and any(entry % GROUPS or entry % heads for entry in entries):
            raise _odd(place, key, value, f"widths are divided by {GROUPS} groups, and by {heads} attention heads")


def _get(told: Mapping[str, Any], key: str, place: object) -> Any:
    if key not in told:
        raise ModelError(f"{place}: config.json has no {key} under `configurations`; is it DeciDiffusion's?")
    return told[key]


def _read(told: Mapping[str, Any], key: str, kind: str, place: object) -> Any:
    # By type() and not by isinstance: JSON's true is an int.
    value = _get(told, key, place)
    match kind:
        case "int" if type(value) is int:
            return value
        case "float" if type(value) in (int, float):
            return float(value)
        case "tuple[int, ...]" if type(value) is list and value and all(type(entry) is int for entry in value):
            return tuple(value)
    wanted = {"int": "a whole number", "float": "a number"}.get(kind, "a list of whole numbers")
    raise _odd(place, key, value, f"that should be {wanted}")


def _odd(place: object, key: str, value: object, reason: str) -> ModelError:
    shown = list(value) if isinstance(value, tuple) else value
    return ModelError(f"{place}: config.json says {key}={shown!r} under `configurations`: {reason}")
