"""Compare the stored images of two results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from batch_infer import images
from batch_infer.errors import RowError, StorageError
from batch_infer.jobs.recovery import read_intact
from batch_infer.sinks import Sink

EQUAL_PIXELS = "bytes differ, pixels are equal"


@dataclass(frozen=True, slots=True)
class ImageComparison:
    """Result of comparing two images.

    `differs` says whether their pixels differ, or is None if that is unknown or only one image exists. `largest` is the
    largest absolute difference of a channel value, from 1 to 255, and `psnr` the peak signal-to-noise ratio in dB. Both
    are None if the pixels are equal or were not compared. `detail` describes the comparison. With `is_unreadable`, an
    image could not be read, and `differs` comes from the hashes of the pixels.
    """

    differs: bool | None
    detail: str
    largest: int | None = None
    psnr: float | None = None
    is_unreadable: bool = False


def compare_images(
    sink_a: Sink,
    row_a: Mapping[str, Any],
    sink_b: Sink,
    row_b: Mapping[str, Any],
    names: tuple[str, str] = ("A", "B"),
) -> ImageComparison:
    """Compare the images of two results, given by their columns. Raises StorageError.

    `names` are those of the runs in `detail`. Images are read only if their hashes of pixels differ or one has none. A
    flagged image that was replaced by a black one is not compared with a rendered image, whose difference from black
    says nothing about rendering.
    """
    rows, (name_a, name_b) = (row_a, row_b), names
    if None in (row_a["generated_image"], row_b["generated_image"]):
        return ImageComparison(None, f"only {name_a if row_a['generated_image'] else name_b} has an image")
    hashes = {row["pixels_sha256"] for row in rows}
    if len(hashes) == 1 and None not in hashes:
        return ImageComparison(False, EQUAL_PIXELS)
    pixels = [_read_pixels(sink, row, name) for sink, row, name in zip((sink_a, sink_b), rows, names, strict=True)]
    if errors := [content for content in pixels if isinstance(content, str)]:
        return ImageComparison(None if None in hashes else True, "; ".join(errors), is_unreadable=True)
    first, second = (content for content in pixels if not isinstance(content, str))
    if first.shape != second.shape:
        return ImageComparison(True, f"{_format_size(first)} pixels in {name_a}, {_format_size(second)} in {name_b}")
    is_blank_a, is_blank_b = _is_blank(row_a, first), _is_blank(row_b, second)
    if is_blank_a != is_blank_b:
        return ImageComparison(True, f"{name_a if is_blank_a else name_b} has a black image instead of a flagged one")
    return _compare_pixels(first, second)


def _compare_pixels(first: np.ndarray, second: np.ndarray) -> ImageComparison:
    """Compare two images (H, W, 3) uint8 of equal shape."""
    largest = int(np.abs(first.astype(np.int16) - second).max())
    if not largest:
        return ImageComparison(False, EQUAL_PIXELS)
    psnr = round(images.compute_psnr(first, second), 2)
    return ImageComparison(True, f"largest difference {largest} of 255, PSNR {psnr:.2f} dB", largest, psnr)


def _read_pixels(sink: Sink, row: Mapping[str, Any], name: str) -> np.ndarray | str:
    """Return the pixels of a result's image, or a message with the name of the run. Raises StorageError."""
    path = row["generated_image"]
    try:
        content = read_intact(sink, path, row["sha256"], row["image_bytes"])
        if content is None:
            return f"{path} is missing or damaged in {name}"
        return images.decode(content)
    except RowError as error:
        return f"{path} in {name}: {error}"
    except StorageError as error:
        if isinstance(error.__cause__, PermissionError):
            return f"{path} cannot be read in {name}: {error.__cause__.strerror}"
        raise


def _is_blank(row: Mapping[str, Any], image: np.ndarray) -> bool:
    """Return whether a result stores the black image of --on-flagged blank."""
    return row["status"] == "flagged" and not image.any()


def _format_size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
