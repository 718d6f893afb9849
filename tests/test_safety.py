"""The checkpoint's checker decides like diffusers, returns scores, and also checks the edges of images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batch_infer.records import Verdict
from batch_infer.safety.checker import StableDiffusionChecker, tiles_of
from tests.checkpoints import probe_images
from tests.rendering import load_family

PROBES = 24


@pytest.fixture(scope="module")
def model(sd1_folder: Path) -> Any:
    return load_family(sd1_folder, with_checker=True)


@pytest.fixture(scope="module")
def checker(model: Any) -> StableDiffusionChecker:
    return StableDiffusionChecker(model.safety_checker, model.feature_extractor, batch=4)


@contextmanager
def filled(model: Any, part: str, value: float) -> Iterator[None]:
    """Fill one of the checker's weight tensors with a value during the block."""
    weights = model.safety_checker.get_parameter(part).data
    original = weights.clone()
    weights.fill_(value)
    try:
        yield
    finally:
        weights.copy_(original)


def check_all(checker: StableDiffusionChecker, images: list[np.ndarray], batch: int = 4) -> list[Verdict]:
    return [v for start in range(0, len(images), batch) for v in checker.check(images[start : start + batch])]


def test_squares_get_the_verdict_of_diffusers(model: Any, checker: StableDiffusionChecker) -> None:
    images = probe_images(PROBES, 64, 64)
    pixels = model.feature_extractor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    _, flagged = model.safety_checker(clip_input=pixels, images=[image.copy() for image in images])
    assert [verdict.nsfw for verdict in check_all(checker, images)] == flagged
    assert 0 < sum(flagged) < PROBES


def test_scores_are_kept_and_explain_the_verdict(checker: StableDiffusionChecker) -> None:
    for verdict in check_all(checker, probe_images(PROBES)):
        assert verdict.checker == "stable_diffusion"
        assert verdict.scores is not None
        assert list(verdict.scores) == [f"concept_{k}" for k in range(17)]
        assert verdict.nsfw == any(score > 0 for score in verdict.scores.values())


def test_special_care_lowers_the_other_thresholds(model: Any, checker: StableDiffusionChecker) -> None:
    images = probe_images(4)
    with filled(model, "special_care_embeds_weights", 2.0):  # above any cosine
        calm = checker.check(images)
    with filled(model, "special_care_embeds_weights", -2.0):
        alert = checker.check(images)
    for before, after in zip(calm, alert, strict=True):
        assert before.scores is not None
        assert after.scores == pytest.approx({name: score + 0.01 for name, score in before.scores.items()})


def test_a_verdict_does_not_depend_on_its_neighbours(checker: StableDiffusionChecker) -> None:
    images = probe_images(4)
    together = checker.check(images)
    assert [checker.check([image])[0] for image in images] == together
    assert checker.check(images[::-1]) == together[::-1]


def test_images_are_not_changed(checker: StableDiffusionChecker) -> None:
    images = probe_images(PROBES)
    copies = [image.copy() for image in images]
    check_all(checker, images)
    assert all(np.array_equal(image, copy) for image, copy in zip(images, copies, strict=True))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("is_tall", [False, True], ids=["wide", "tall"])
def test_edges_of_long_images_are_checked(checker: StableDiffusionChecker, index: int, is_tall: bool) -> None:
    images = probe_images(PROBES)
    verdicts = check_all(checker, images)
    flagged = images[[verdict.nsfw for verdict in verdicts].index(True)]
    clean = Image.fromarray(images[[verdict.nsfw for verdict in verdicts].index(False)])
    squares = [np.asarray(clean)] * 3
    assert not checker.check([np.concatenate(squares, axis=1 - is_tall)])[0].nsfw or index != 1
    squares[index] = flagged
    assert checker.check([np.concatenate(squares, axis=1 - is_tall)])[0].nsfw


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 40), (40, 32), (32, 64), (96, 32), (32, 257)])
def test_tiles_cover_the_image_and_include_its_centre(height: int, width: int) -> None:
    image = np.arange(height * width).reshape(height, width, 1).repeat(3, axis=2) % 251
    tiles = [np.asarray(tile) for tile in tiles_of(image.astype(np.uint8))]
    side = min(height, width)
    assert len(tiles) % 2 == 1
    assert {tile.shape for tile in tiles} == {(side, side, 3)}
    top, left = (height - side) // 2, (width - side) // 2
    assert np.array_equal(tiles[len(tiles) // 2], image[top : top + side, left : left + side])
    assert np.array_equal(tiles[0], image[:side, :side])
    assert np.array_equal(tiles[-1], image[height - side :, width - side :])
    assert len(tiles) * side >= max(height, width)


@pytest.mark.parametrize("part", ["concept_embeds_weights", "special_care_embeds_weights", "visual_projection.weight"])
def test_a_score_of_nan_flags_the_image(model: Any, checker: StableDiffusionChecker, part: str) -> None:
    with filled(model, part, float("nan")):
        verdicts = checker.check(probe_images(4))
    assert [verdict.nsfw for verdict in verdicts] == [True] * 4
