"""Save checkpoints as single files with the tensor names of the first Stable Diffusion release."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LAYERS = 1
"""Resnets in each of the tiny UNet's blocks."""
LEVELS = 4
"""Levels of the tiny VAE."""
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
STEM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(folder: Path, file: Path) -> Path:
    """Save the UNet, VAE and text encoder of a tiny Stable Diffusion 1 folder in one file."""
    parts: dict[str, tuple[str, Callable[[str], str]]] = {
        "unet": ("model.diffusion_model.", _unet),
        "vae": ("first_stage_model.", _vae),
        "text_encoder": ("cond_stage_model.transformer.text_model.", str),
    }
    tensors = {}
    for part, (start, rename) in parts.items():
        (weights,) = (folder / part).glob("*.safetensors")
        for name, tensor in load_file(weights).items():
            convolved = "mid.attn_1" in rename(name) and tensor.ndim == 2
            tensors[start + rename(name)] = tensor[:, :, None, None].contiguous() if convolved else tensor
    save_file(tensors, file)
    return file


def fill_cache(cache: Path, repository: str, folder: Path) -> Path:
    """Make a Hugging Face cache with a folder's configs and vocabulary as a repository without weights."""
    commit = "0" * 40
    repository_folder = cache / f"models--{repository.replace('/', '--')}"
    (repository_folder / "refs").mkdir(parents=True)
    (repository_folder / "refs" / "main").write_text(commit)
    snapshot = repository_folder / "snapshots" / commit
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    return snapshot


def _unet(name: str) -> str:
    if match := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name):
        direction, block, kind, layer, rest = match.groups()
        return _in_block(direction, int(block), kind, int(layer), rest)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, layer, rest = match.groups()
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * int(layer)}.{_resnet(rest)}"
    stem, _, kind = name.rpartition(".")
    return f"{STEM[stem]}.{kind}"


def _in_block(direction: str, block: int, kind: str, layer: int, rest: str) -> str:
    position = block * (LAYERS + 1) + (LAYERS if "samplers" in kind else layer)
    start = f"input_blocks.{position + 1}" if direction == "down" else f"output_blocks.{position}"
    if kind == "resnets":
        return f"{start}.0.{_resnet(rest)}"
    if kind == "attentions":
        return f"{start}.1.{rest}"
    # The tiny UNet's only upsampler follows a block without attention.
    return f"{start}.0.{rest.replace('conv', 'op')}" if direction == "down" else f"{start}.1.{rest}"


def _resnet(rest: str) -> str:
    layer, kind = rest.split(".")
    return f"{RESNET[layer]}.{kind}"


def _vae(name: str) -> str:
    if match := re.match(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(.*)", name):
        net, direction, level, rest = match.groups()
        position = int(level) if direction == "down" else LEVELS - 1 - int(level)
        rest = rest.replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut")
        return f"{net}.{direction}.{position}.{rest.replace('samplers.0', 'sample')}"
    if match := re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.*)\.(weight|bias)", name):
        net, kind, layer, rest, end = match.groups()
        return f"{net}.mid." + (
            f"attn_1.{ATTENTION[rest]}.{end}" if kind == "attentions" else f"block_{int(layer) + 1}.{rest}.{end}"
        )
    return name.replace("conv_norm_out", "norm_out")


def zeros(*names: str, shape: tuple[int, ...] = (1,)) -> dict[str, torch.Tensor]:
    """Return tensors with these names, for files that are recognized by tensor names."""
    return {name: torch.zeros(shape) for name in names}
