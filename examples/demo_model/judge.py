"""A judge of pictures that knows only pixels and geometry: it names the five attributes of a picture."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import ndimage

import world

# An object must differ from its ground by this much (bytes, Euclidean) to be seen at all.
FAINTEST = 30.0
SMALLEST_AREA = 40.0
# Between the two sizes, on the geometric scale; and half-way from the centre to the other positions.
SIZE_BORDER = (world.SIZES["small"] * world.SIZES["large"]) ** 0.5
OFF_CENTRE = 6.5
# Below this overlap with its best template an object is no shape at all.
POOREST_MATCH = 0.6


def nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Name the palette's colour that lies closest."""
    return min(palette, key=lambda name: float(np.sum((np.array(palette[name]) - colour) ** 2)))


@cache
def templates() -> dict[tuple[str, int], np.ndarray]:
    """Return each shape's ideal cover, centred, at every size in half pixels that a picture could hold."""
    middle = (world.PICTURE / 2, world.PICTURE / 2)
    return {
        (shape, half): world.outline_mask(shape, middle, half / 2) for shape in world.SHAPES for half in range(32, 82)
    }


def cover(picture: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Estimate how much of each pixel the object covers, and the object's colour."""
    away = np.linalg.norm(picture - ground, axis=-1)
    if away.max() < FAINTEST:
        return None
    body = away > 0.7 * np.quantile(away[away > FAINTEST], 0.9) if (away > FAINTEST).any() else away > FAINTEST
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
    """Return where a profile first and last rises through a half, between pixels."""
    high = np.flatnonzero(profile >= 0.5)
    first, last = int(high[0]), int(high[-1])
    before = profile[first - 1] if first > 0 else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first - float(min(before, 0.5)) * 2 * 0.5, last + 1 + float(min(after, 0.5)) * 2 * 0.5


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Return the soft intersection over union of two covers."""
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


def best_shape(amount: np.ndarray, middle: tuple[float, float], extent: float) -> tuple[str, float, float]:
    """Name the shape whose ideal drawing overlaps best, with that drawing's size and the overlap."""
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
    """Name the position of an object's middle."""
    dx, dy = middle[0] - world.PICTURE / 2, middle[1] - world.PICTURE / 2
    if max(abs(dx), abs(dy)) < OFF_CENTRE:
        return "centre"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "bottom" if dy > 0 else "top"


def judge(picture: np.ndarray) -> world.Scene | None:
    """Name what a 64x64 RGB picture of bytes shows, or nothing where no object of the world is seen."""
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
    if score < POOREST_MATCH:
        return None
    return world.Scene(
        colour=nearest(colour, world.COLOURS),
        shape=shape,
        size="small" if size < SIZE_BORDER else "large",
        position=place(middle),
        ground=nearest(ground, world.GROUNDS),
    )
