"""Helpers for tests that make requests, load checkpoints and render."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from batch_infer.chain import BatchSizes, RenderedImage, StepLevelChain
from batch_infer.models import load_latent_diffusion, read_card
from batch_infer.records import PromptRequest, SamplingParams, Source
from batch_infer.safety import ImageChecker
from batch_infer.settings import ModelSettings, SchedulerSpec

if TYPE_CHECKING:
    from batch_infer.models import LatentDiffusion

CPU = torch.device("cpu")


def make_request(
    name: str = "row",
    prompt: str = "a red circle",
    *,
    steps: int = 4,
    guidance: float = 7.5,
    rescale: float = 0.0,
    negative: str | None = None,
    seed: int = 0,
    size: tuple[int, int] = (64, 64),
) -> PromptRequest:
    """Return a request for one image. `size` is (height, width)."""
    params = SamplingParams(*size, steps, guidance, rescale)
    return PromptRequest(name, 0, prompt, negative, seed, params, Source("table.csv", 0), fingerprint=name)


def load_family(folder: Path, scheduler: str | None = None, *, with_checker: bool = False) -> LatentDiffusion:
    """Load a checkpoint on the CPU in float32, with its own scheduler or one in the syntax of `--scheduler`."""
    spec = SchedulerSpec.parse(scheduler) if scheduler else None
    card = read_card(ModelSettings(name=str(folder), scheduler=spec))
    return load_latent_diffusion(card, CPU, torch.float32, with_checker=with_checker)


def copy_folder(folder: Path, target: Path) -> Path:
    """Copy a checkpoint into a folder, so that it can be changed."""
    return Path(shutil.copytree(folder, target / folder.name))


def render(
    model: Any,
    requests: Iterable[PromptRequest],
    *,
    slots: int = 6,
    decode: int = 2,
    checker: ImageChecker | None = None,
) -> dict[str, RenderedImage]:
    """Render requests that must all give an image, and return the outcomes by id."""
    rendered = {}
    for outcome in StepLevelChain(model, BatchSizes(slots, decode), checker).render(requests):
        assert isinstance(outcome, RenderedImage), outcome.error
        rendered[outcome.request.id] = outcome
    return rendered


def max_difference(image: np.ndarray, other: np.ndarray) -> int:
    """Return the largest difference between two images in any channel of any pixel, in steps of 1/255."""
    return int(np.abs(image.astype(int) - other.astype(int)).max())
