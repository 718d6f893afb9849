"""The scenes of the demo model: their attributes, drawings and captions."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image, ImageDraw

PICTURE = 64
SUPERSAMPLE = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 46),
    "orange": (247, 132, 30),
    "yellow": (252, 208, 44),
    "green": (58, 166, 74),
    "teal": (18, 164, 172),
    "blue": (46, 98, 222),
    "purple": (140, 66, 188),
    "pink": (244, 122, 172),
}
# The grounds are all darker or paler than any object colour, so every pair of the two can be told apart.
GROUNDS: dict[str, tuple[int, int, int]] = {
    "navy": (22, 30, 74),
    "charcoal": (52, 54, 60),
    "forest": (20, 62, 44),
    "wine": (78, 18, 44),
    "mint": (192, 238, 214),
    "cream": (252, 244, 222),
    "sky": (188, 218, 248),
    "lavender": (218, 204, 244),
}
SIZES: dict[str, float] = {"small": 22.0, "large": 34.0}
POSITIONS: dict[str, tuple[int, int]] = {
    "centre": (0, 0),
    "left": (-13, 0),
    "right": (13, 0),
    "top": (0, -13),
    "bottom": (0, 13),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "ring", "cross")
UNSAFE_SHAPE = "cross"

HELD_OUT = 512
SPLIT_SEED = 20

TEMPLATES = (
    "a {size} {colour} {shape} on a {ground} ground, {place}",
    "{size} {colour} {shape}, {position}, {ground} background",
    "a {size} {colour} {shape} {place}, on {ground}",
    "{place}: a {size} {colour} {shape} on a {ground} ground",
    "a picture of a {size} {colour} {shape} {place} of a {ground} background",
    "{ground} background with a {size} {colour} {shape} {place}",
    "{colour} {shape}, {size}, {position}, {ground} ground",
)
PLACES: dict[str, tuple[str, ...]] = {
    "centre": ("in the centre", "at the centre"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "on the top"),
    "bottom": ("at the bottom", "on the bottom"),
}


@dataclass(frozen=True)
class Scene:
    """One combination of the five attributes."""

    colour: str
    shape: str
    size: str
    position: str
    ground: str


ATTRIBUTES = ("colour", "shape", "size", "position", "ground")
SCENES = tuple(Scene(*words) for words in itertools.product(COLOURS, SHAPES, SIZES, POSITIONS, GROUNDS))


def split() -> tuple[list[Scene], list[Scene]]:
    """Return the scenes for training and the held-out ones."""
    order = list(SCENES)
    random.Random(SPLIT_SEED).shuffle(order)
    return order[HELD_OUT:], order[:HELD_OUT]


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe a scene with a random template."""
    words = dict(zip(ATTRIBUTES, astuple(scene), strict=True))
    return rng.choice(TEMPLATES).format(place=rng.choice(PLACES[scene.position]), **words)


def vocabulary() -> list[str]:
    """Return all words of captions, those of attributes first."""
    attributes = [*COLOURS, *SHAPES, *SIZES, *POSITIONS, *GROUNDS]
    filler = [word for text in (*TEMPLATES, *itertools.chain(*PLACES.values())) for word in text.split()]
    plain = [word.strip(",:") for word in filler if "{" not in word]
    return list(dict.fromkeys([*attributes, *plain]))


def _star() -> list[tuple[float, float]]:
    points = []
    for step in range(10):
        reach = 1.06 if step % 2 == 0 else 0.45
        angle = math.pi * step / 5
        points.append((reach * math.sin(angle), 0.1 - reach * math.cos(angle)))
    return points


def _heart() -> list[tuple[float, float]]:
    points = []
    for step in range(72):
        t = 2 * math.pi * step / 72
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16, -(y + 2.5) / 14.5))
    return points


def _cross() -> list[tuple[float, float]]:
    arm, tip = 0.3, 1.1
    upright = [(arm, arm), (arm, tip), (-arm, tip), (-arm, arm), (-tip, arm), (-tip, -arm)]
    upright += [(-arm, -arm), (-arm, -tip), (arm, -tip), (arm, -arm), (tip, -arm), (tip, arm)]
    half = math.sqrt(0.5)
    return [((x - y) * half, (x + y) * half) for x, y in upright]


# Outlines in a box from -1 to 1 on both axes.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "star": _star(),
    "diamond": [(0.0, -1.0), (0.84, 0.0), (0.0, 1.0), (-0.84, 0.0)],
    "heart": _heart(),
    "cross": _cross(),
}


def outline_mask(shape: str, centre: tuple[float, float], size: float, picture: int = PICTURE) -> np.ndarray:
    """Return the coverage of each pixel by the shape, from 0 to 1."""
    scale, half = SUPERSAMPLE, size / 2
    canvas = Image.new("L", (picture * scale, picture * scale))
    pen = ImageDraw.Draw(canvas)
    x, y = centre
    if shape in OUTLINES:
        pen.polygon([((x + half * u) * scale, (y + half * v) * scale) for u, v in OUTLINES[shape]], fill=255)
    else:
        for reach, fill in ((half, 255), (half * 0.52, 0))[: 2 if shape == "ring" else 1]:
            box = [(x - reach) * scale, (y - reach) * scale, (x + reach) * scale, (y + reach) * scale]
            pen.ellipse(box, fill=fill)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / 255


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """Draw a scene with slight random variations, as RGB (64, 64, 3) uint8."""
    dx, dy = POSITIONS[scene.position]
    centre = (PICTURE / 2 + dx + rng.uniform(-1, 1), PICTURE / 2 + dy + rng.uniform(-1, 1))
    mask = outline_mask(scene.shape, centre, SIZES[scene.size] * rng.uniform(0.96, 1.04))[..., None]
    ground = np.array([part + rng.uniform(-4, 4) for part in GROUNDS[scene.ground]], dtype=np.float32)
    colour = np.array([part + rng.uniform(-5, 5) for part in COLOURS[scene.colour]], dtype=np.float32)
    picture: np.ndarray = np.clip(ground + mask * (colour - ground) + 0.5, 0, 255).astype(np.uint8)
    return picture
