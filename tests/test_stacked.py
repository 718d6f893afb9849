"""Step-level batching of any pipeline: every request gets one outcome, an image or an error, as planned."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_infer.chain import BatchSizes, RenderedImage, StepLevelChain, UnrenderedRow
from batch_infer.models import AnyPipeline
from batch_infer.planning import BatchingEstimator, order_requests
from batch_infer.records import PromptRequest
from tests import painting
from tests.fakes import Recorder
from tests.painting import load_painting, paint_row
from tests.stackers import assert_restored

WIDE = (32, 64)
FAILURES = {"refused": "invalid", "broken": "failed", "poison": "failed", "nan": "failed"}


@pytest.fixture(scope="module")
def painter() -> AnyPipeline:
    return load_painting()


@pytest.fixture(scope="module")
def storing() -> AnyPipeline:
    """A model whose rows run alone."""
    return load_painting(painting.StoringPipeline)


def run(
    model: AnyPipeline,
    requests: Sequence[PromptRequest],
    slots: int = 8,
    decode: int = 2,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[StepLevelChain, dict[str, RenderedImage | UnrenderedRow]]:
    chain = StepLevelChain(model, BatchSizes(slots, decode), None, stop)
    outcomes = list(chain.render(requests))
    results = {outcome.request.id: outcome for outcome in outcomes}
    assert len(results) == len(outcomes)
    assert_restored(model)
    return chain, results


def pixels_of(outcome: RenderedImage | UnrenderedRow) -> np.ndarray:
    assert isinstance(outcome, RenderedImage), outcome.error
    return outcome.pixels


def assert_as_estimated(chain: StepLevelChain, requests: Sequence[PromptRequest], slots: int) -> None:
    model: Any = chain.model
    estimator = BatchingEstimator(lambda _: slots)
    for request in requests:
        estimator.add(request, model.count_cost(request.params, request.negative_prompt))
    estimator.close()
    actual = {size: (stages.images, stages.row_forwards, stages.ticks) for size, stages in chain.stages_by_size.items()}
    assert {size: (cost.images, cost.row_forwards, cost.ticks) for size, cost in estimator.costs.items()} == actual


ROWS = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.sampled_from([1.0, 5.0, 7.5]),
        st.sampled_from([None, "", "green"]),
        st.sampled_from(["a star", "a ring", *FAILURES]),
        st.sampled_from([(32, 32), WIDE]),
    ),
    max_size=20,
)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, slots=st.integers(1, 9), decode=st.integers(1, 3), runs_alone=st.booleans())
def test_every_request_gets_one_outcome_as_planned(
    painter: AnyPipeline, storing: AnyPipeline, rows: list[Any], slots: int, decode: int, runs_alone: bool
) -> None:
    requests = [
        paint_row(str(k), text, steps=steps, guidance=guidance, negative=negative, size=size, seed=k)
        for k, (steps, guidance, negative, text, size) in enumerate(rows)
    ]
    chain, results = run(storing if runs_alone else painter, requests, slots, decode)
    assert results.keys() == {request.id for request in requests}
    for request in requests:
        outcome = results[request.id]
        assert outcome.request is request
        params = request.params
        # One step is too few for a step at which the network gets values that are not finite.
        status = FAILURES.get(request.prompt) if request.prompt != "poison" or params.num_inference_steps > 1 else None
        if status is None:
            assert pixels_of(outcome).shape == (params.height, params.width, 3)
            assert pixels_of(outcome).dtype == np.uint8
        else:
            assert isinstance(outcome, UnrenderedRow)
            assert outcome.status == status
    if not FAILURES.keys() & {request.prompt for request in requests}:
        assert_as_estimated(chain, requests, slots)


PIPELINES = (painting.PaintingPipeline, painting.SequentialPipeline, painting.StoringPipeline)


@pytest.mark.parametrize("pipeline_type", PIPELINES, ids=lambda item: item.__name__)
def test_the_plan_predicts_the_denoiser_calls(pipeline_type: Any) -> None:
    """Rows without guidance overtake, and sizes alternate."""
    model, draw = load_painting(pipeline_type), random.Random(1)
    for slots in (2, 3, 5, 8):
        requests = [
            paint_row(
                str(k), size=WIDE if 15 <= k < 20 else (32, 32), guidance=draw.choice([1.0, 3.0]),
                steps=draw.randint(1, 9), seed=k,
            )
            for k in range(30)
        ]  # fmt: skip
        chain, results = run(model, requests, slots)
        assert all(isinstance(outcome, RenderedImage) for outcome in results.values())
        assert_as_estimated(chain, requests, slots)


def test_rows_at_different_denoisers_share_no_call() -> None:
    """So a pipeline of two stages takes more calls than estimated, with as many batch elements of rows."""
    model = load_painting(painting.NestedPipeline)
    requests = [paint_row(str(k), steps=1 + k % 5, guidance=1.0 + k % 2, seed=k) for k in range(20)]
    chain, results = run(model, requests, 4)
    assert all(isinstance(outcome, RenderedImage) for outcome in results.values())
    costs = [model.count_cost(request.params, None) for request in requests]
    assert sum(cost.evaluations for cost in costs) > chain.stages.ticks
    # A row's first denoiser takes two elements with guidance, and its second takes one.
    assert chain.stages.row_forwards == sum(
        request.params.num_inference_steps + 2 * request.params.slots for request in requests
    )


def test_mixed_rows_keep_the_slots_full(painter: AnyPipeline) -> None:
    draw = random.Random(0)
    rows = [
        paint_row(str(k), steps=draw.randint(4, 30), guidance=draw.choice([1.0, 2.0, 3.5, 5.0, 7.5, 10.0]), seed=k)
        for k in range(200)
    ]
    planned = list(order_requests(rows, lambda _: 16))
    chain, results = run(painter, planned, slots=16)
    assert len(results) == 200
    assert chain.stages.occupancy >= 0.85
    assert chain.stages.images == 200
    assert_as_estimated(chain, planned, 16)


def test_the_seconds_of_the_stages_add_up(painter: AnyPipeline) -> None:
    chain, _ = run(painter, [paint_row(str(k), f"new {k}") for k in range(12)])
    stages = chain.stages
    assert all(seconds > 0 for seconds in (stages.encode, stages.denoise, stages.decode))
    assert stages.encode + stages.denoise + stages.decode + stages.check <= stages.seconds


@pytest.mark.parametrize("name", ["painter", "storing"])
def test_a_bad_row_affects_no_other(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    rows = [paint_row("a", seed=1), paint_row("b", seed=2, guidance=1.0), paint_row("c", seed=3, steps=7)]
    _, expected = run(model, rows)
    bad = [paint_row(text, text, seed=4) for text in FAILURES]
    _, results = run(model, [bad[0], rows[0], *bad[1:3], rows[1], bad[3], rows[2]])
    for row in rows:
        assert np.array_equal(pixels_of(results[row.id]), pixels_of(expected[row.id]))
    pipeline = type(model.pipeline).__name__
    errors = {one.id: getattr(results[one.id], "error", None) for one in bad}
    assert errors == {
        "refused": f"{pipeline} does not support this row: such a prompt is refused",
        "broken": f"{pipeline} failed: the loop is broken",
        "poison": f"{pipeline} failed: the network gets values that are not finite",
        "nan": "the model's output is not finite at 4 steps and guidance_scale 5; try other values",
    }


# Memory


@pytest.mark.parametrize(
    ("slots", "images", "final_sizes"),
    [(5, 1000, (4, 4)), (2, 1000, (2, 4)), (1000, 1, (16, 1)), (3, 2, (2, 2))],
    ids=["few slots", "one row", "few images", "few of both"],
)
def test_out_of_memory_halves_a_batch_and_loses_no_row(
    painter: AnyPipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    slots: int,
    images: int,
    final_sizes: tuple[int, int],
) -> None:
    rows = [paint_row(str(k), steps=2 + k % 3, guidance=1 + k % 2 * 4, seed=k) for k in range(30)]
    _, expected = run(painter, rows, *final_sizes)
    monkeypatch.setattr(painter.pipeline.transformer, "memory", slots)
    monkeypatch.setattr(painter.pipeline.vae, "memory", images)
    chain, results = run(painter, rows, 16, 4)
    assert results.keys() == expected.keys()
    assert chain.batch_sizes.for_size((32, 32)) == final_sizes
    assert chain.batch_sizes.for_size(WIDE) == (16, 4)
    for name, outcome in results.items():
        assert np.array_equal(pixels_of(outcome), pixels_of(expected[name]))
    assert "out of memory at 32x32 pixels: continuing with" in caplog.text


def test_rows_are_rendered_one_by_one_if_only_one_element_fits(
    painter: AnyPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(painter.pipeline.transformer, "memory", 1)
    chain, results = run(painter, [paint_row(str(k), guidance=1.0, seed=k) for k in range(6)])
    assert all(isinstance(outcome, RenderedImage) for outcome in results.values())
    assert chain.batch_sizes.for_size((32, 32))[0] == 1
    assert "continuing with 1 slots instead of 2" in caplog.text


def test_an_image_that_does_not_fit_into_memory_fails(painter: AnyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painter.pipeline.transformer, "memory", 0)
    _, results = run(painter, [paint_row("a"), paint_row("b", size=WIDE)])
    for outcome in results.values():
        assert isinstance(outcome, UnrenderedRow)
        assert outcome.status == "failed"
        assert "pixels does not fit into the device's memory (CUDA out of memory" in outcome.error
        assert "\n" not in outcome.error
    assert len(results) == 2


def test_out_of_memory_later_keeps_finished_rows(painter: AnyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = StepLevelChain(painter, BatchSizes(8, 1), None)
    outcomes = chain.render(paint_row(str(k), guidance=1.0, seed=k) for k in range(30))
    early = list(islice(outcomes, 10))
    monkeypatch.setattr(painter.pipeline.transformer, "memory", 4)
    late = list(outcomes)
    assert Counter(outcome.request.id for outcome in (*early, *late)) == Counter(str(k) for k in range(30))
    slots = [outcome.slots for outcome in (*early, *late) if isinstance(outcome, RenderedImage)]
    assert slots == sorted(slots, reverse=True)
    assert set(slots) == {8, 4}


# Stops and sources


def test_a_stop_takes_effect_between_ticks_and_denoised_rows_are_decoded(painter: AnyPipeline) -> None:
    calls = count()
    rows = [paint_row("short", steps=4), *(paint_row(name, steps=500) for name in ("long", "waiting"))]
    rows += [paint_row("wide", size=WIDE)]
    chain, results = run(painter, rows, 4, 4, stop=lambda: next(calls) > 12)
    assert list(results) == ["short"]
    assert isinstance(results["short"], RenderedImage)
    assert 4 < chain.stages.ticks < 16


def test_a_stop_before_the_first_call_reads_one_row_at_most(painter: AnyPipeline) -> None:
    rows = iter([paint_row("a"), paint_row("b"), paint_row("c")])
    assert list(StepLevelChain(painter, BatchSizes(4, 1), None, stop=lambda: True).render(rows)) == []
    assert [row.id for row in rows] == ["b", "c"]


@pytest.mark.parametrize("name", ["painter", "storing"])
def test_a_table_is_read_as_it_is_rendered(name: str, request: pytest.FixtureRequest) -> None:
    model, read = request.getfixturevalue(name), count()

    def table() -> Iterator[PromptRequest]:
        for k in read:
            yield paint_row(str(k), "refused" if k % 5 == 4 else "fine", seed=k, steps=1 + k % 4, guidance=1 + k % 2)

    chain = StepLevelChain(model, BatchSizes(4, 2), None)
    with closing(chain.render(table())) as outcomes:  # type: ignore[type-var]
        assert len(list(islice(outcomes, 40))) == 40
    assert next(read) <= 40 + 3 * 4
    assert_restored(model)


def test_waiting_rows_are_bounded(painter: AnyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that waits holds its embeddings and its generator."""
    unfinished: list[int] = []
    rendered = 0

    def table() -> Iterator[PromptRequest]:
        for k in range(100):
            unfinished.append(k - rendered)
            yield paint_row(str(k), seed=k, steps=1 + k % 7, guidance=1 + k % 3)

    for _ in StepLevelChain(painter, BatchSizes(8, 2), None).render(table()):
        rendered += 1
    assert max(unfinished) <= 8 + 8 + 8 // 2 + 2


def test_images_are_decoded_and_checked_in_micro_batches(painter: AnyPipeline) -> None:
    checker, vae = Recorder(), painter.pipeline.vae
    vae.calls.clear()
    rows = [paint_row(str(k), size=WIDE if k > 5 else (32, 32), seed=k, steps=1 + k % 3) for k in range(11)]
    outcomes = list(StepLevelChain(painter, BatchSizes(4, 3), checker).render(rows))
    assert all(isinstance(outcome, RenderedImage) and outcome.verdict.nsfw is False for outcome in outcomes)
    assert vae.calls == [3] * 4
    assert all(len(set(shapes)) == 1 and len(shapes) <= 3 for shapes in checker.calls)
    assert sum(map(len, checker.calls)) == 11


def test_closing_the_generator_restores_the_networks(painter: AnyPipeline) -> None:
    outcomes: Any = StepLevelChain(painter, BatchSizes(4, 1), None).render(paint_row(str(k)) for k in count())
    assert isinstance(next(outcomes), RenderedImage)
    outcomes.close()
    assert_restored(painter)
    assert torch.is_grad_enabled()


def test_an_unexpected_error_ends_the_chain(painter: AnyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SystemError("a bug")

    monkeypatch.setattr(painting.PaintingPipeline, "predict", fail)
    with pytest.raises(SystemError, match="a bug"):
        list(StepLevelChain(painter, BatchSizes(4, 2), None).render([paint_row("a"), paint_row("b")]))
    assert_restored(painter)
