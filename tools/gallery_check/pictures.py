"""Draw landscapes with grain, whose files have about the size of those of photographs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

SKIES = (
    ((52, 84, 130), (238, 196, 160)),
    ((36, 42, 78), (226, 120, 96)),
    ((120, 170, 200), (240, 236, 220)),
    ((24, 34, 58), (90, 120, 160)),
    ((190, 150, 170), (250, 226, 200)),
    ((90, 130, 120), (224, 226, 190)),
)


def draw_landscape(seed: int, side: int) -> Image.Image:
    """Draw a sky with a sun, some ranges of hills, and grain. The same seed gives the same picture at any size."""
    random = np.random.default_rng(seed)
    top, bottom = (np.array(color, float) for color in SKIES[random.integers(len(SKIES))])
    rows = np.linspace(0, 1, side)
    picture = np.repeat((top + (bottom - top) * rows[:, None])[:, None, :], side, axis=1)
    columns, heights = np.meshgrid(rows, rows)
    x, y, radius = random.uniform(0.2, 0.8), random.uniform(0.15, 0.5), random.uniform(0.04, 0.1)
    glow = np.clip(1.4 - np.hypot(columns - x, heights - y) / radius, 0, 1)[..., None]
    picture = picture * (1 - glow) + np.array((255, 244, 220)) * glow
    ridges = random.integers(2, 6)
    base = bottom * random.uniform(0.5, 0.8)
    for ridge in range(ridges):
        waves = random.uniform(2, 14, 4)[:, None] * rows + random.uniform(0, 6, 4)[:, None]
        line = 0.5 + 0.12 * ridge + (np.sin(waves) * random.uniform(0.01, 0.05, 4)[:, None]).sum(0)
        picture[heights > line[None, :]] = base * (1 - 0.75 * (ridge + 1) / ridges)
    grain = np.random.default_rng(seed + 1).normal(0, 9, (side, side, 1))
    pixels = np.clip(picture + grain, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(side / 900))


def encode(picture: Image.Image, image_format: str, **options: int) -> bytes:
    """Return a picture as the bytes of a file."""
    stream = io.BytesIO()
    picture.save(stream, image_format, **options)
    return stream.getvalue()
