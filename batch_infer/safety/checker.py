"""Run the safety checker of Stable Diffusion checkpoints, and return its scores.

diffusers' StableDiffusionSafetyChecker paints a flagged image black and drops the scores. For square images, this
module makes the same decision with the same weights. Each of 17 concepts has a threshold for the cosine similarity of
its embedding and the image's CLIP embedding. The thresholds are 0.01 lower if one of 3 special-care concepts matches
(Rando et al., arXiv 2210.04610).
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
"""Added to the score of every concept if a special-care concept matches, as in diffusers."""


class StableDiffusionChecker:
    """Checks images with a checkpoint's safety checker, in calls with exactly `batch` tiles."""

    name = "stable_diffusion"

    def __init__(self, module: Any, feature_extractor: Any, batch: int) -> None:
        self._module, self._feature_extractor, self._batch = module, feature_extractor, batch

    def check(self, images: Sequence[np.ndarray]) -> list[Verdict]:
        """Check images (H, W, 3) uint8 of one size.

        The network takes square images. Others are cut into square tiles, which cover the image. One of them is the
        centre, the only part that diffusers checks. The highest score of each concept counts.
        """
        tiles = [tile for image in images for tile in tiles_of(image)]
        tiles_per_image = len(tiles) // len(images)
        tiles += [tiles[-1]] * (-len(tiles) % self._batch)
        scores: list[dict[str, float]] = []
        for start in range(0, len(tiles), self._batch):
            scores += self._score_tiles(tiles[start : start + self._batch])
        starts = range(0, len(images) * tiles_per_image, tiles_per_image)
        return [self._make_verdict(scores[start : start + tiles_per_image]) for start in starts]

    @torch.inference_mode()
    def _score_tiles(self, tiles: list[Image.Image]) -> list[dict[str, float]]:
        module = self._module
        pixels = self._feature_extractor(tiles, return_tensors="pt").pixel_values
        weights = module.visual_projection.weight
        embeddings = module.visual_projection(module.vision_model(pixels.to(weights.device, weights.dtype))[1])
        concepts = _similarity(embeddings, module.concept_embeds) - module.concept_embeds_weights.float().cpu()
        care = _similarity(embeddings, module.special_care_embeds) - module.special_care_embeds_weights.float().cpu()
        return list(map(_adjust_scores, concepts.double().tolist(), care.double().tolist()))

    def _make_verdict(self, scores: list[dict[str, float]]) -> Verdict:
        """Return the verdict on an image from the scores of its tiles."""
        highest = {name: max(tile[name] for tile in scores) for name in scores[0]}
        # Not any(score > 0): NaN must not pass.
        if all(score <= 0 for tile in scores for score in tile.values()):
            return Verdict(False, self.name, highest)
        name = max(highest, key=highest.__getitem__)
        return Verdict(True, self.name, highest, f"the safety check flagged the image ({name} {highest[name]:+.3f})")


def _adjust_scores(concepts: list[float], care: list[float]) -> dict[str, float]:
    """Return the scores of one tile, rounded to 3 decimals as in diffusers. A score that is NaN or above 0 flags it."""
    adjustment = SPECIAL_CARE_ADJUSTMENT if any(round(score, 3) > 0 for score in care) else 0.0
    if any(map(math.isnan, care)):
        adjustment = math.nan  # makes every score NaN, which flags the tile
    return {f"concept_{k}": round(score + adjustment, 3) for k, score in enumerate(concepts)}


def _similarity(embeddings: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    return (normalize(embeddings) @ normalize(concepts).T).float().cpu()


def tiles_of(image: np.ndarray) -> list[Image.Image]:
    """Return square tiles that cover an image (H, W, 3). Their number is odd, so that one of them is the centre."""
    height, width = image.shape[:2]
    side, long_side = min(height, width), max(height, width)
    count = -(-long_side // side)
    count += 1 - count % 2
    full = Image.fromarray(image)
    tiles = []
    for k in range(count):
        start = round(k * (long_side - side) / (count - 1)) if count > 1 else 0
        left, top = (start, 0) if width >= height else (0, start)
        tiles.append(full.crop((left, top, left + side, top + side)))
    return tiles
