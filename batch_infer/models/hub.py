"""Checkpoints from the Hugging Face Hub, by diffusers' own downloader."""

from __future__ import annotations

from pathlib import Path

from batch_infer.errors import ModelError, first_line


def download(name: str, revision: str | None, variant: str | None) -> Path:
    """The folder of a checkpoint in the local cache, fetched where needed: safetensors and configs, never code."""
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name, revision=revision, variant=variant, use_safetensors=True))
    except (OSError, ValueError) as error:  # what diffusers and huggingface_hub raise, HTTP errors included
        raise ModelError(
            f"{name} could not be fetched from the Hugging Face Hub (a private or gated model wants HF_TOKEN): "
            f"{first_line(error)}"
        ) from error
