"""Pipeline-call batching: every request gets one outcome, an image or an error, whatever its neighbours are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, groupby, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_infer.autotune import plateau
from batch_infer.autotune.plateau import find_pipeline_plateau
from batch_infer.chain import BatchSizes, PipelineCallChain, RenderedImage, UnrenderedRow
from batch_infer.planning import PipelineBatchingEstimator, order_requests
from batch_infer.records import PromptRequest
from tests.fakes import PaintingPipeline, Recorder, paint


def run(
    requests: Sequence[PromptRequest], slots: int = 4, stop: Callable[[], bool] = lambda: False, **painter: Any
) -> tuple[PipelineCallChain, dict[str, RenderedImage | UnrenderedRow]]:
    chain = PipelineCallChain(PaintingPipeline(**painter), BatchSizes(slots, 2), None, stop)  # type: ignore[arg-type]
    outcomes = list(chain.render(requests))
    results = {outcome.request.id: outcome for outcome in outcomes}
    assert len(results) == len(outcomes)
    return chain, results


def calls_of(chain: PipelineCallChain) -> Any:
    return chain.model.calls  # type: ignore[attr-defined]


ROWS = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.sampled_from([0.0, 1.0, 7.5]),
        st.sampled_from([0.0, 0.7]),
        st.sampled_from([None, "", "green"]),
        st.sampled_from([0.25, float("nan"), "refused", "broken"]),
        st.sampled_from([(16, 16), (16, 24)]),
    ),
    max_size=20,
)


@settings(max_examples=80)
@given(rows=ROWS, slots=st.integers(2, 7), needs_separate_calls=st.booleans())
def test_every_request_gets_one_outcome_as_planned(rows: list[Any], slots: int, needs_separate_calls: bool) -> None:
    requests = [
        paint(str(k), colour, steps=steps, guidance=guidance, rescale=rescale, negative=negative, size=size)
        for k, (steps, guidance, rescale, negative, colour, size) in enumerate(rows)
    ]
    planned = list(order_requests(requests))
    chain, results = run(planned, slots, needs_separate_calls=needs_separate_calls)
    assert results.keys() == {request.id for request in requests}
    for request in requests:
        outcome = results[request.id]
        assert outcome.request is request
        if request.prompt == "0.25":
            assert isinstance(outcome, RenderedImage)
            assert (outcome.pixels == 64).all()
            assert outcome.pixels.shape == (request.params.height, request.params.width, 3)
        else:
            assert isinstance(outcome, UnrenderedRow)
            assert (outcome.status == "invalid") == (request.prompt == "refused")
    if not any(request.prompt in ("refused", "broken") for request in requests):
        packing = PipelineBatchingEstimator(lambda size: slots)
        for request in planned:
            packing.add(request, request.params.num_inference_steps)
        packing.close()
        for size, load in packing.costs.items():
            stages = chain.stages_by_size[size]
            assert (load.images, load.row_forwards, load.ticks) == (stages.images, stages.row_forwards, stages.ticks)
            assert stages.slot_ticks == load.ticks * load.slots


def test_rows_with_the_same_values_are_planned_together() -> None:
    combinations = product((1, 2), (1.0, 5.0, 7.5), (0.0, 0.7), (None, "green"), range(4))
    rows = [
        paint(str(k), steps=steps, guidance=guidance, rescale=rescale, negative=negative)
        for k, (steps, guidance, rescale, negative, _) in enumerate(combinations)
    ]
    planned = order_requests(rows[::2] + rows[1::2])
    kinds = [kind for kind, _ in groupby(planned, lambda row: row.batch_key)]
    assert len(kinds) == len(set(kinds)) == 24


def test_the_plateau_is_a_batch_that_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plateau, "TRIAL_SECONDS", 0.0)
    roomy: Any = PaintingPipeline(memory=4)
    assert find_pipeline_plateau(roomy, paint().params).slots <= 8
    with pytest.raises(torch.OutOfMemoryError):
        find_pipeline_plateau(PaintingPipeline(memory=0), paint().params)  # type: ignore[arg-type]


def test_only_rows_with_the_same_values_share_a_call() -> None:
    rows = [paint("a"), paint("b"), paint("c", negative="green"), paint("d", negative=""), paint("e", guidance=5.0)]
    rows += [paint("f", guidance=1.0), paint("g", guidance=1.0), paint("h", guidance=1.0)]
    chain, _ = run(rows)
    assert calls_of(chain) == [(2, 2), (2, 2), (1, 2), (3, 4)]
    assert chain.stages.occupancy == (2 * 2 + 2 * 2 + 1 * 2 + 3) / 16


def test_a_refused_row_affects_no_other() -> None:
    """Each row is rendered again, in a batch of the same shape."""
    rows = [paint("a", 0.1), paint("b", "refused"), paint("c", 0.2), paint("d", "broken"), paint("e", 0.3)]
    chain, results = run(rows, slots=10)
    assert [type(results[name]) for name in "abcde"] == [
        RenderedImage,
        UnrenderedRow,
        RenderedImage,
        UnrenderedRow,
        RenderedImage,
    ]
    assert calls_of(chain) == [(5, 5), (1, 5), (1, 5), (1, 5), (1, 5), (1, 5)]
    errors = {
        name: (outcome.status == "invalid", outcome.error)
        for name, outcome in results.items()
        if isinstance(outcome, UnrenderedRow)
    }
    assert errors == {
        "b": (True, "PaintingPipeline rejects this row"),
        "d": (False, "PaintingPipeline failed"),
    }
    assert chain.stages.images == 3


def test_values_that_are_not_finite_fail_the_row() -> None:
    _, results = run([paint("broken", float("nan"), steps=3), paint("fine", steps=3)])
    broken = results["broken"]
    assert isinstance(broken, UnrenderedRow)
    assert broken.status == "failed"
    assert "not finite at 3 steps and guidance_scale 7.5" in broken.error
    assert isinstance(results["fine"], RenderedImage)


def test_out_of_memory_halves_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    rows = [paint(f"{size} {k}", size=size) for size in ((16, 16), (16, 24)) for k in range(9)]
    chain, results = run(rows, slots=16, memory=3)
    assert all(isinstance(outcome, RenderedImage) and outcome.slots == 4 for outcome in results.values())
    assert len(results) == len(rows)
    assert {batch for _, batch in calls_of(chain)} == {8, 4, 2}
    assert chain.batch_sizes.for_size((16, 16))[0] == 4
    assert "out of memory at 16x16 pixels: continuing with 8 slots instead of 16" in caplog.text


def test_rows_are_rendered_one_by_one_if_only_one_fits(caplog: pytest.LogCaptureFixture) -> None:
    rows = [paint(str(k), guidance=1.0) for k in range(5)]
    chain, results = run(rows, slots=8, memory=1)
    assert sorted(results) == [str(k) for k in range(5)]
    assert all(isinstance(outcome, RenderedImage) for outcome in results.values())
    assert calls_of(chain)[-5:] == [(1, 1)] * 5
    assert "out of memory at 16x16 pixels: continuing with one row per call" in caplog.text


@pytest.mark.parametrize("needs_separate_calls", [False, True])
def test_an_image_that_does_not_fit_into_memory_fails(needs_separate_calls: bool) -> None:
    _, results = run([paint("a"), paint("b", size=(16, 24))], memory=0, needs_separate_calls=needs_separate_calls)
    for outcome in results.values():
        assert isinstance(outcome, UnrenderedRow)
        assert outcome.status == "failed"
        assert "pixels does not fit into the device's memory" in outcome.error
        assert "\n" not in outcome.error
    assert len(results) == 2


def test_a_stop_takes_effect_between_batches() -> None:
    calls = count()
    chain, results = run([paint(str(k)) for k in range(10)], stop=lambda: next(calls) >= 2)
    assert sorted(results) == ["0", "1", "2", "3"]
    assert calls_of(chain) == [(2, 2), (2, 2)]


def test_a_table_is_read_as_it_is_rendered() -> None:
    read: list[str] = []

    def table() -> Any:
        for k in count():
            read.append(str(k))
            yield paint(str(k))

    chain = PipelineCallChain(PaintingPipeline(), BatchSizes(4, 2), None)  # type: ignore[arg-type]
    outcomes = chain.render(table())
    next(outcomes)
    assert len(read) <= 3


def test_images_are_checked_in_batches() -> None:
    checker = Recorder()
    chain = PipelineCallChain(PaintingPipeline(), BatchSizes(16, 3), checker)  # type: ignore[arg-type]
    outcomes = list(chain.render([paint(str(k)) for k in range(8)]))
    assert [len(shapes) for shapes in checker.calls] == [3, 3, 2]
    assert all(isinstance(outcome, RenderedImage) and outcome.verdict.checker == "recorder" for outcome in outcomes)


def test_stages_add_up() -> None:
    chain, _ = run([paint(str(k)) for k in range(8)])
    stages = chain.stages
    assert 0 < stages.encode + stages.denoise + stages.decode + stages.check <= stages.seconds
