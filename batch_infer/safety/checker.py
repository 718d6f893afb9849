"""The safety checker of Stable Diffusion checkpoints, with scores.

diffusers' StableDiffusionSafetyChecker paints a flagged image black and drops the scores. This module makes the same
decision with the same weights: the cosine similarity of the image's CLIP embedding to 17 concepts, each with a
threshold, and to 3 special-care concepts that lower the other thresholds by 0.01 (Rando et al., arXiv 2210.04610).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from batch_infer.records import Verdict

SPECIAL_CARE_ADJUSTMENT = 0.01
"""As in diffusers, added to the score of every concept if a special-care concept matches."""


class StableDiffusionChecker:
    """Checks images with a checkpoint's safety checker, in calls with exactly `batch` squares."""

    name = "stable_diffusion"

    def __init__(self, module: Any, feature_extractor: Any, batch: int) -> None:
        self._module, self._feature_extractor, self._batch = module, feature_extractor, batch

    def check(self, images: Sequence[np.ndarray]) -> list[Verdict]:
        """Check images (H, W, 3) uint8 of one size.

        The checker takes squares. Other images are covered by overlapping squares, including the centre square, the
        only one that diffusers checks. The highest score of each concept counts.
        """
        tiles = [tiles_of(image) for image in images]
        per_image = len(tiles[0])
        squares = [tile for group in tiles for tile in group]
        squares += [squares[-1]] * (-len(squares) % self._batch)
        starts = range(0, len(squares), self._batch)
        scores = [row for start in starts for row in self._scores(squares[start : start + self._batch])]
        return [self._verdict(scores[k * per_image : (k + 1) * per_image]) for k in range(len(images))]

    @torch.inference_mode()
    def _scores(self, squares: list[Image.Image]) -> list[dict[str, float]]:
        module = self._module
        pixels = self._feature_extractor(squares, return_tensors="pt").pixel_values
        weights = module.visual_projection.weight
        embeddings = module.visual_projection(module.vision_model(pixels.to(weights.device, weights.dtype))[1])
        concepts = _similarity(embeddings, module.concept_embeds) - module.concept_embeds_weights.float().cpu()
        care = _similarity(embeddings, module.special_care_embeds) - module.special_care_embeds_weights.float().cpu()
        return [_adjust(*pair) for pair in zip(concepts.double().tolist(), care.double().tolist(), strict=True)]

    def _verdict(self, scores: list[dict[str, float]]) -> Verdict:
        """Return the verdict on an image from the scores of its squares."""
        highest = {name: max(tile[name] for tile in scores) for name in scores[0]}
        # Not any(score > 0): NaN must not pass.
        if all(score <= 0 for tile in scores for score in tile.values()):
            return Verdict(False, self.name, highest)
        name = max(highest, key=lambda concept: highest[concept])
        return Verdict(True, self.name, highest, f"the safety check flagged the image ({name} {highest[name]:+.3f})")


def _adjust(concepts: list[float], care: list[float]) -> dict[str, float]:
    """Return the scores of one square, rounded to 3 digits as in diffusers. A score above 0 flags the square."""
    adjustment = SPECIAL_CARE_ADJUSTMENT if any(round(score, 3) > 0 for score in care) else 0.0
    if any(map(math.isnan, care)):
        adjustment = math.nan  # makes every score NaN, which flags the square
    return {f"concept_{k}": round(score + adjustment, 3) for k, score in enumerate(concepts)}


def _similarity(embeddings: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    return (normalize(embeddings) @ normalize(concepts).T).float().cpu()


def tiles_of(image: np.ndarray) -> list[Image.Image]:
    """Return squares that cover an image (H, W, 3): an odd number, so that they include the centre crop."""
    height, width = image.shape[:2]
    side, long = min(height, width), max(height, width)
    count = -(-long // side)
    count += 1 - count % 2
    full = Image.fromarray(image)
    tiles = []
    for k in range(count):
        start = round(k * (long - side) / (count - 1)) if count > 1 else 0
        left, top = (start, 0) if width >= height else (0, start)
        tiles.append(full.crop((left, top, left + side, top + side)))
    return tiles
