"""Half precision compared with single precision on the trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from batch_infer.models import load_latent_diffusion, read_card
from batch_infer.settings import ModelSettings
from tests.rendering import CPU, make_request, render

PROMPTS = ("a large red circle on a white ground", "a small blue star at the left", "a green square", "a purple heart")
ROWS = [make_request(text, text, steps=8 + 4 * k, guidance=1 + 2 * k, seed=k) for k, text in enumerate(PROMPTS)]
MIN_PSNR = 40.0


def render_in(dtype: torch.dtype, folder: Path) -> dict[str, np.ndarray]:
    model = load_latent_diffusion(read_card(ModelSettings(name=str(folder))), CPU, dtype, with_checker=False)
    return {name: rendered.pixels for name, rendered in render(model, ROWS).items()}


@pytest.mark.promises
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_close_to_single_precision(dtype: torch.dtype, demo_folder: Path) -> None:
    """The peak signal-to-noise ratio in dB is 10 log10(255^2 / mean squared error)."""
    single, half = render_in(torch.float32, demo_folder), render_in(dtype, demo_folder)
    for name, image in single.items():
        error = np.mean(np.square(image.astype(float) - half[name].astype(float)))
        assert 10 * np.log10(255**2 / max(error, 1e-9)) >= MIN_PSNR
