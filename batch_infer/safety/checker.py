"""The safety checker of Stable Diffusion checkpoints, with its scores.

diffusers' StableDiffusionSafetyChecker paints a flagged image black and drops its scores. The same decision is made
here from the same weights: cosine similarity of the image's CLIP embedding to 17 concepts, each with its own threshold,
and to 3 special-care concepts that lower the other thresholds by 0.01 (Rando et al., arXiv 2210.04610).
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

SPECIAL_CARE = 0.01
"""Added by diffusers to the score of every concept if a special-care concept matches."""


class StableDiffusionChecker:
    """A checkpoint's own checker, called with a fixed batch of `batch` images."""

    name = "stable_diffusion"

    def __init__(self, module: Any, feature_extractor: Any, batch: int) -> None:
        self._module, self._feature_extractor, self._batch = module, feature_extractor, batch

    def check(self, images: Sequence[np.ndarray]) -> list[Verdict]:
        """Check images (H, W, 3) uint8 of one size, in calls that are padded to the full batch.

        The checker takes squares. An image that is not square is covered by overlapping squares, among them the centre
        one, which is all that diffusers checks. The highest score of each concept counts.
        """
        tiles = [tiles_of(image) for image in images]
        per_image = len(tiles[0])
        flat = [tile for group in tiles for tile in group]
        flat += [flat[-1]] * (-len(flat) % self._batch)
        calls = [self._scores(flat[first : first + self._batch]) for first in range(0, len(flat), self._batch)]
        scores = [row for call in calls for row in call]
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
        """Return the verdict on the scores of an image's squares."""
        highest = {name: max(tile[name] for tile in scores) for name in scores[0]}
        # Not `any(score > 0)`: nan must not pass as clean.
        if all(score <= 0 for tile in scores for score in tile.values()):
            return Verdict(False, self.name, highest)
        name = max(highest, key=lambda concept: highest[concept])
        return Verdict(True, self.name, highest, f"the safety check flagged the image ({name} {highest[name]:+.3f})")


def _adjust(concepts: list[float], care: list[float]) -> dict[str, float]:
    """Return the scores of one square, rounded to 3 digits as in diffusers. A concept above 0 flags it."""
    is_special = any(round(score, 3) > 0 for score in care)
    # nan spreads to every concept, and flags.
    adjustment = math.nan if any(map(math.isnan, care)) else SPECIAL_CARE if is_special else 0.0
    return {f"concept_{k}": round(score + adjustment, 3) for k, score in enumerate(concepts)}


def _similarity(embeddings: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
    return (normalize(embeddings) @ normalize(concepts).T).float().cpu()


def tiles_of(image: np.ndarray) -> list[Image.Image]:
    """Return squares that cover an image (H, W, 3): an odd number, so that the centre crop is one of them."""
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
