"""A judge that reads the five attributes of a picture from its pixels by geometry."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import ndimage

import world

# Minimum Euclidean distance of an object's colour from its ground, in steps of 1/255.
MIN_CONTRAST = 30.0
SMALLEST_AREA = 40.0
# Geometric mean of the two sizes; and half of the distance from the centre to the other positions.
SIZE_BORDER = (world.SIZES["small"] * world.SIZES["large"]) ** 0.5
OFF_CENTRE = 6.5
# Minimum overlap of an object with its best template.
MIN_OVERLAP = 0.6


def nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Return the name of the nearest colour in a palette."""
    return min(palette, key=lambda name: float(np.sum((np.array(palette[name]) - colour) ** 2)))


@cache
def templates() -> dict[tuple[str, int], np.ndarray]:
    """Return the ideal coverage of each centred shape at every possible size in half pixels."""
    middle = (world.PICTURE / 2, world.PICTURE / 2)
    return {
        (shape, half): world.outline_mask(shape, middle, half / 2) for shape in world.SHAPES for half in range(32, 82)
    }


def cover(picture: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Estimate the coverage of each pixel by the object, and the object's colour."""
    away = np.linalg.norm(picture - ground, axis=-1)
    if away.max() <= MIN_CONTRAST:
        return None
    body = (
        away > 0.7 * np.quantile(away[away > MIN_CONTRAST], 0.9) if (away > MIN_CONTRAST).any() else away > MIN_CONTRAST
    )
    colour = np.median(picture[body], axis=0)
    axis = colour - ground
    amount = np.clip((picture - ground) @ axis / max(float(axis @ axis), 1.0), 0, 1)
    parts, count = ndimage.label(amount > 0.5)
    if count == 0:
        return None
    areas = ndimage.sum_labels(amount, parts, range(1, count + 1))
    main = parts == int(np.argmax(areas)) + 1
    return amount * ndimage.binary_dilation(main, iterations=2), colour


def reach(profile: np.ndarray) -> tuple[float, float]:
    """Return the first and last crossing of 0.5 in a profile, with subpixel accuracy."""
    high = np.flatnonzero(profile >= 0.5)
    first, last = int(high[0]), int(high[-1])
    before = profile[first - 1] if first > 0 else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first - float(min(before, 0.5)) * 2 * 0.5, last + 1 + float(min(after, 0.5)) * 2 * 0.5


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Return the soft intersection over union of two coverages."""
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


def best_shape(amount: np.ndarray, middle: tuple[float, float], extent: float) -> tuple[str, float, float]:
    """Return the shape with the largest overlap, its size and the overlap."""
    half = world.PICTURE / 2
    best = ("nothing", 0.0, 0.0)
    centred = ndimage.shift(amount, (half - middle[1], half - middle[0]), order=1)
    for (shape, halves), ideal in templates().items():
        if abs(halves / 2 - extent) > 4:
            continue
        score = overlap(centred, ideal)
        if score > best[2]:
            best = (shape, halves / 2, score)
    return best


def place(middle: tuple[float, float]) -> str:
    """Return the name of a position."""
    dx, dy = middle[0] - world.PICTURE / 2, middle[1] - world.PICTURE / 2
    if max(abs(dx), abs(dy)) < OFF_CENTRE:
        return "centre"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "bottom" if dy > 0 else "top"


def judge(picture: np.ndarray) -> world.Scene | None:
    """Return the scene in an RGB picture (64, 64, 3) uint8, or None if no known object is visible."""
    pixels = picture.astype(np.float64)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    seen = cover(pixels, ground)
    if seen is None or seen[0].sum() < SMALLEST_AREA:
        return None
    amount, colour = seen
    left, right = reach(amount.max(0))
    top, bottom = reach(amount.max(1))
    middle = ((left + right) / 2, (top + bottom) / 2)
    shape, size, score = best_shape(amount, middle, max(right - left, bottom - top))
    if score < MIN_OVERLAP:
        return None
    return world.Scene(
        colour=nearest(colour, world.COLOURS),
        shape=shape,
        size="small" if size < SIZE_BORDER else "large",
        position=place(middle),
        ground=nearest(ground, world.GROUNDS),
    )
