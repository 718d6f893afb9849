"""Prompts and images within the bounds of what Azure AI Content Safety takes in one request."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

TEXT_LENGTH = 10_000
"""Unicode code points, which is what Python counts too."""
OVERLAP = 200
"""Code points that two pieces of a text share: longer than a phrase, and little to be asked twice."""
SHORTEST_SIDE, LONGEST_SIDE = 50, 2048
IMAGE_BYTES = 4 * 1024 * 1024
"""Of the file itself: the service counts before base64 makes it a third longer."""
PNG_LEVEL = 1
JPEG_QUALITIES = (95, 90, 80, 65, 50, 30)
"""Noise of the largest size is far below the bound at the last one."""


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most 10,000 code points, each of which begins with the last 200 of the one before it.

    So a phrase of up to 200 code points stands whole in one piece, wherever the cuts fall. No text is one empty piece.
    """
    step = TEXT_LENGTH - OVERLAP
    for start in range(0, max(len(text) - OVERLAP, 1), step):
        yield text[start : start + TEXT_LENGTH]


def image_file(pixels: np.ndarray) -> bytes:
    """An image (H, W, 3) uint8 as a file that the service takes: a PNG, or a JPEG where that would be too large."""
    image = fitted(Image.fromarray(pixels))
    found = _saved(image, "PNG", compress_level=PNG_LEVEL)
    qualities = iter(JPEG_QUALITIES)
    while len(found) > IMAGE_BYTES:
        found = _saved(image, "JPEG", quality=next(qualities))
    return found


def fitted(image: Image.Image) -> Image.Image:
    """The whole image with sides of 50 to 2048 pixels: scaled evenly, and in a black frame where it is too slender."""
    scale = max(SHORTEST_SIDE / min(image.size), 1)
    scale = min(scale, LONGEST_SIDE / max(image.size))
    width, height = (min(max(round(side * scale), 1), LONGEST_SIDE) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    frame = max(width, SHORTEST_SIDE), max(height, SHORTEST_SIDE)
    if frame == image.size:
        return image
    framed = Image.new(image.mode, frame)
    framed.paste(image, ((frame[0] - width) // 2, (frame[1] - height) // 2))
    return framed


def _saved(image: Image.Image, file_format: str, **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()
