"""Rows of each text-to-image pipeline of diffusers: compared with single calls, and independent of their neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from batch_infer.models import AnyPipeline
from batch_infer.models.pipeline_rules import find_class
from tests.pipelines.every import PIPELINES
from tests.pipelines.measuring import call_alone, make_model, make_pipeline, make_row, render, rows_of
from tests.pipelines.table import INTRODUCTION, TABLE, describe
from tests.rendering import max_difference

# Two classes of diffusers use deprecated names of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")

QUICK = {
    "StableDiffusionPipeline", "StableDiffusionPAGPipeline", "FluxPipeline", "LuminaPipeline", "ZImagePipeline",
    "CogView4Pipeline",
}  # fmt: skip
"""Classes tested by `make test`. Each represents others whose rows share calls in the same way."""


def cases(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.promises) for name in names]


@pytest.fixture(scope="module", params=cases(PIPELINES))
def model(request: pytest.FixtureRequest) -> Iterator[AnyPipeline]:
    yield make_model(make_pipeline(request.param))


def test_there_are_many() -> None:
    assert len(PIPELINES) >= 40
    for name in PIPELINES:
        assert find_class(name).__name__ == name


def test_rows_match_single_calls(model: AnyPipeline) -> None:
    name = type(model.pipeline).__name__
    pipeline, rows = make_pipeline(name), rows_of(name)
    rendered = render(model, rows)
    references = {row.id: call_alone(pipeline, row) for row in rows}
    for row, expected in references.items():
        assert rendered[row].shape == expected.shape
        assert max_difference(rendered[row], expected) <= 1, row
        # Otherwise the comparison would not detect swapped rows.
        assert all(max_difference(expected, image) > 2 for other, image in references.items() if other != row)


def test_an_image_depends_only_on_its_row(model: AnyPipeline) -> None:
    """Its bytes are the same alone, and in another order among rows with texts of other lengths."""
    name = type(model.pipeline).__name__
    rows = rows_of(name)
    strangers = [
        make_row(name, f"stranger {k}", "and more " * (k * k), steps=PIPELINES[name].steps[-1], seed=k)
        for k in range(3)
    ]
    together = render(model, rows)
    others = render(model, [*strangers[:1], *rows[::-1], *strangers[1:]])
    for row in rows:
        alone = render(model, [row])[row.id]
        assert np.array_equal(alone, together[row.id]), row.id
        assert np.array_equal(alone, others[row.id]), row.id


def test_the_text_changes_the_image(model: AnyPipeline) -> None:
    name = type(model.pipeline).__name__
    texts = [make_row(name, text, text, seed=9) for text in ("a red circle", "two blue squares")]
    first, second = render(model, texts).values()
    assert max_difference(first, second) > 2


def test_the_documented_sharing_is_what_is_measured(model: AnyPipeline) -> None:
    assert describe(model) in TABLE.read_text("utf-8").splitlines()


def test_the_table_lists_every_tested_class() -> None:
    text = TABLE.read_text("utf-8")
    assert text.startswith(INTRODUCTION)
    lines = text.removeprefix(INTRODUCTION).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == sorted(PIPELINES)


@pytest.mark.promises
@pytest.mark.parametrize("name", [name for name, tiny in PIPELINES.items() if tiny.other_scheduler])
def test_another_scheduler_matches_single_calls(name: str) -> None:
    model, pipeline = make_model(make_pipeline(name, other_scheduler=True)), make_pipeline(name, other_scheduler=True)
    rows = rows_of(name)[:3]
    rendered = render(model, rows)
    for row in rows:
        assert max_difference(rendered[row.id], call_alone(pipeline, row)) <= 1
