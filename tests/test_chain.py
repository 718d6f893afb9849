"""Step-level batching: every request gets one outcome, an image or an error, whatever its neighbours are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice, pairwise
from pathlib import Path
from threading import active_count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_infer.chain import (
    BatchSizes,
    NoRequest,
    RenderedImage,
    StepLevelChain,
    UnrenderedRow,
)
from batch_infer.diffusion import Context, Slots
from batch_infer.planning import BatchingEstimator
from batch_infer.records import PromptRequest, RowCost, Verdict
from batch_infer.safety.checker import StableDiffusionChecker
from tests.fakes import MemoryLimitedPainter, Painter, Recorder, paint
from tests.painting import load_painting
from tests.rendering import load_family, make_request, render

REJECTED_STEPS = 3
"""The largest step count that the painter's scheduler rejects."""


def run(
    requests: Sequence[PromptRequest], slots: int = 4, decode: int = 2
) -> tuple[StepLevelChain, list[RenderedImage | UnrenderedRow]]:
    chain = StepLevelChain(Painter(), BatchSizes(slots, decode), None)
    return chain, list(chain.render(requests))


ROWS = st.lists(
    st.tuples(
        st.integers(1, 8),
        st.sampled_from([0.0, 1.0, 7.5]),
        st.sampled_from([0.0, 0.7]),
        st.sampled_from([0.5, float("nan")]),
        st.sampled_from([(16, 16), (16, 24)]),
    ),
    max_size=12,
)


@settings(max_examples=15)
@given(rows=ROWS, slots=st.integers(2, 5), decode=st.integers(1, 3))
def test_every_request_gets_one_outcome(rows: list[Any], slots: int, decode: int) -> None:
    requests = [
        paint(str(k), colour, steps=steps, guidance=guidance, rescale=rescale, size=size)
        for k, (steps, guidance, rescale, colour, size) in enumerate(rows)
    ]
    chain, outcomes = run(requests, slots, decode)
    assert Counter(outcome.request.id for outcome in outcomes) == Counter(request.id for request in requests)
    for outcome in outcomes:
        params = outcome.request.params
        rejected = params.num_inference_steps <= REJECTED_STEPS
        if isinstance(outcome, RenderedImage):
            assert outcome.request.prompt != "nan"
            assert not rejected
            assert outcome.pixels.shape == (params.height, params.width, 3)
            assert outcome.pixels.dtype == np.uint8
        else:
            assert (outcome.status == "invalid") == rejected
            assert rejected or outcome.request.prompt == "nan"
    painter: Any = chain.model
    assert set(painter.decoded) <= {(decode, 3, 2, 2), (decode, 3, 2, 3)}  # one padded shape per size


def test_an_image_depends_only_on_its_row(sd1_folder: Path) -> None:
    """Bytes and verdict are the same alone and among rows with other sizes, step counts and guidance, in any order."""
    model = load_family(sd1_folder, with_checker=True)
    checker = StableDiffusionChecker(model.safety_checker, model.feature_extractor, batch=2)
    rows = [make_request("guided", "a red circle", steps=6, seed=5)]
    rows += [make_request("unguided", "two blue squares", steps=5, guidance=1.0, seed=6)]
    rows += [make_request("rescaled", "a star", steps=4, rescale=0.7, negative="green", seed=7)]
    rest = [
        make_request(f"other {k}", f"{k} rings", steps=4 + k % 5, guidance=1 + k % 3, rescale=k % 2, seed=k, size=size)
        for k, size in enumerate([(64, 64)] * 6 + [(64, 96)] * 2)
    ]
    alone = {row.id: render(model, [row], checker=checker)[row.id] for row in rows}
    for order in ([*rows, *rest], [*rest, *rows], [*rest[:3], rows[2], *rest[3:6], rows[1], rows[0], *rest[6:]]):
        together = render(model, order, checker=checker)
        for name, expected in alone.items():
            assert np.array_equal(together[name].pixels, expected.pixels)
            assert together[name].verdict == expected.verdict


def test_a_step_count_that_the_scheduler_rejects_affects_only_its_row() -> None:
    _, outcomes = run([paint("few", steps=REJECTED_STEPS), paint("fine", steps=5), paint("fewer", steps=1)])
    results = {outcome.request.id: outcome for outcome in outcomes}
    assert isinstance(results["fine"], RenderedImage)
    for name, steps in (("few", 3), ("fewer", 1)):
        rejected = results[name]
        assert isinstance(rejected, UnrenderedRow)
        assert rejected.status == "invalid"
        assert f"num_inference_steps={steps}" in rejected.error


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float32, False), (torch.float16, True)])
def test_values_that_are_not_finite_fail_the_row(dtype: torch.dtype, advice: bool) -> None:
    rows = [paint("broken", float("nan"), steps=4, guidance=7.5), paint("fine", steps=4)]
    outcomes = list(StepLevelChain(Painter(dtype), BatchSizes(4, 2), Recorder()).render(rows))
    results = {outcome.request.id: outcome for outcome in outcomes}
    broken = results["broken"]
    assert isinstance(broken, UnrenderedRow)
    assert broken.status == "failed"
    assert "not finite at 4 steps and guidance_scale 7.5" in broken.error
    assert ("--dtype float32" in broken.error) == advice
    assert isinstance(results["fine"], RenderedImage)


def test_occupancy_is_unet_evaluations_per_slot() -> None:
    chain, _ = run([paint("one", steps=4, guidance=1.0), paint("two", steps=4, guidance=1.0)], slots=2)
    evaluations = Painter().solver.table(4).evaluations
    assert (chain.stages.ticks, chain.stages.row_forwards) == (evaluations, 2 * evaluations)
    assert chain.stages.occupancy == 1.0
    chain, _ = run([paint("guided", steps=4), paint("unguided", steps=4, guidance=1.0)], slots=4)
    assert chain.stages.occupancy == 3 / 4
    assert StepLevelChain(Painter(), BatchSizes(2, 1), None).stages.occupancy == 0.0


def test_mixed_rows_keep_the_slots_full() -> None:
    rows = [paint(str(k), steps=4 + k * 7 % 20, guidance=[1.0, 5.0, 7.5][k % 3]) for k in range(80)]
    chain, outcomes = run(sorted(rows, key=lambda row: -row.params.num_inference_steps), slots=8)
    assert len(outcomes) == 80
    assert chain.stages.occupancy > 0.95
    stages = chain.stages
    assert stages.denoise > 0
    assert stages.encode + stages.denoise + stages.decode + stages.check <= stages.seconds


def test_a_single_free_slot_goes_to_a_row_without_guidance() -> None:
    """Two guided rows do not fit into three slots, but an unguided one fits with the first."""
    chain, outcomes = run([paint("a", steps=4), paint("b", steps=4), paint("c", steps=4, guidance=1.0)], slots=3)
    assert {outcome.request.id for outcome in outcomes[:2]} == {"a", "c"}
    assert chain.stages.ticks == 2 * Painter().solver.table(4).evaluations


def test_no_more_rows_finish_after_a_stop() -> None:
    calls = count()
    chain = StepLevelChain(Painter(), BatchSizes(4, 1), None, stop=lambda: next(calls) > 24)
    rows = [paint("short", steps=4), paint("long", steps=500), paint("waiting", steps=4, size=(16, 24))]
    outcomes = list(chain.render(rows))
    assert [outcome.request.id for outcome in outcomes] == ["short"]
    assert isinstance(outcomes[0], RenderedImage)
    assert chain.stages.ticks < 26


def test_finished_rows_are_yielded_after_a_stop() -> None:
    """A finished row whose micro-batch is not full yet is decoded."""
    calls = count()
    chain = StepLevelChain(Painter(), BatchSizes(4, 4), None, stop=lambda: next(calls) > 24)
    outcomes = list(chain.render([paint("short", steps=4), paint("long", steps=500)]))
    assert [outcome.request.id for outcome in outcomes] == ["short"]


def test_a_stop_before_the_first_unet_call_reads_one_row_at_most() -> None:
    rows = iter([paint("a"), paint("b"), paint("c")])
    assert list(StepLevelChain(Painter(), BatchSizes(4, 1), None, stop=lambda: True).render(rows)) == []
    assert [row.id for row in rows] == ["b", "c"]


def test_an_endless_table_is_read_as_it_is_rendered() -> None:
    read = count()

    def table() -> Iterator[PromptRequest]:
        for k in read:
            yield paint(str(k), steps=4)

    outcomes = list(islice(StepLevelChain(Painter(), BatchSizes(4, 2), None).render(table()), 10))
    assert len(outcomes) == 10
    assert next(read) <= 10 + 3 * 4


@pytest.mark.parametrize("load", [Painter, load_painting], ids=["family", "any pipeline"])
def test_a_row_is_finished_while_the_source_has_no_other_yet(load: Callable[[], Any]) -> None:
    """Its batch is padded instead of waiting for more rows."""
    chain = StepLevelChain(load(), BatchSizes(4, 2), None)
    rows = [paint("first", steps=4, size=(32, 32)), paint("second", steps=4, size=(32, 32))]
    finished: list[str] = []

    class Source:
        def poll(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
            if not rows:
                return NoRequest.END
            return rows.pop(0) if len(rows) + len(finished) == 2 else NoRequest.NOT_YET

    for outcome in chain.render(Source()):
        finished.append(outcome.request.id)
    assert finished == ["first", "second"]


def test_the_verdict_is_empty_without_a_checker() -> None:
    _, (outcome,) = run([paint(steps=4)])
    assert isinstance(outcome, RenderedImage)
    assert outcome.verdict == Verdict(nsfw=None, checker=None, scores=None)


def test_the_checker_gets_images_of_one_size_and_of_one_micro_batch() -> None:
    checker = Recorder()
    rows = [paint(str(k), steps=4, size=(16, 16 + 8 * (k > 4))) for k in range(8)]
    outcomes = list(StepLevelChain(Painter(), BatchSizes(4, 2), checker).render(rows))
    assert all(isinstance(outcome, RenderedImage) and outcome.verdict.nsfw is False for outcome in outcomes)
    assert all(len(set(shapes)) == 1 and len(shapes) <= 2 for shapes in checker.calls)
    assert sum(map(len, checker.calls)) == 8


def test_an_unexpected_error_ends_the_chain() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        list(
            StepLevelChain(Painter(), BatchSizes(4, 2), None).render([make_request(prompt="no colour", size=(16, 16))])
        )


@pytest.mark.parametrize(("slots", "decode"), [(0, 1), (2, 0)])
def test_batch_sizes_without_an_element_are_rejected(slots: int, decode: int) -> None:
    with pytest.raises(ValueError, match="at least one batch element"):
        BatchSizes(slots, decode)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(4, 12), st.sampled_from([0.0, 7.5]), st.sampled_from([(16, 16), (16, 24)])), max_size=40
    ),
    slots=st.integers(2, 9),
)
@pytest.mark.promises
def test_the_plan_predicts_the_unet_calls(rows: list[tuple[int, float, tuple[int, int]]], slots: int) -> None:
    """In any order of sizes, and if rows without guidance overtake others."""
    requests = [
        paint(str(k), steps=steps, guidance=guidance, size=size) for k, (steps, guidance, size) in enumerate(rows)
    ]
    chain, outcomes = run(requests, slots=slots)
    assert len(outcomes) == len(requests)
    estimator, solver = BatchingEstimator(lambda _: slots), Painter().solver
    for item in requests:
        estimator.add(item, RowCost(solver.table(item.params.num_inference_steps).evaluations, item.params.slots))
    estimator.close()
    actual = {size: (stages.images, stages.row_forwards, stages.ticks) for size, stages in chain.stages_by_size.items()}
    assert {size: (cost.images, cost.row_forwards, cost.ticks) for size, cost in estimator.costs.items()} == actual


# In the background


def test_decoding_in_the_background_changes_no_byte(sd1_folder: Path) -> None:
    """As on a GPU, where another thread decodes and checks."""
    model = load_family(sd1_folder, with_checker=True)
    checker = StableDiffusionChecker(model.safety_checker, model.feature_extractor, batch=2)
    rows = [make_request(str(k), f"{k} rings", steps=2 + k % 5, guidance=1 + k % 3, seed=k) for k in range(9)]
    rows += [make_request("wide", "a star", steps=3, size=(64, 96))]
    results = []
    for in_background in (False, True):
        chain = StepLevelChain(model, BatchSizes(6, 2), checker, in_background=in_background)
        results.append({outcome.request.id: outcome for outcome in chain.render(rows)})
        assert chain.stages.images == len(rows)
        assert chain.stages.check > 0
    assert results[0].keys() == results[1].keys() == {row.id for row in rows}
    for name, expected in results[0].items():
        assert isinstance(expected, RenderedImage)
        actual = results[1][name]
        assert isinstance(actual, RenderedImage)
        assert np.array_equal(actual.pixels, expected.pixels)
        assert actual.verdict == expected.verdict


def test_the_unet_waits_for_a_slow_decoder() -> None:
    class Slow(Painter):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            ticks_at_decode.append(len(chain.stages_by_size) and chain.stages.ticks)
            return super().decode(latents)

    ticks_at_decode: list[int] = []
    chain = StepLevelChain(Slow(), BatchSizes(2, 1), None, in_background=True)
    assert len(list(chain.render(paint(str(k), steps=4, guidance=1.0) for k in range(40)))) == 40
    ticks = [later - earlier for earlier, later in pairwise(ticks_at_decode)]
    assert max(ticks) <= 4 * Painter().solver.table(4).evaluations


def test_an_error_in_the_background_ends_the_chain_and_its_thread() -> None:
    class Broken(Painter):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("a bug")

    threads = active_count()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(
            StepLevelChain(Broken(), BatchSizes(4, 1), None, in_background=True).render(
                [paint(str(k), steps=4) for k in range(6)]
            )
        )
    assert active_count() == threads


def test_closing_the_generator_ends_the_thread() -> None:
    threads = active_count()
    outcomes = StepLevelChain(Painter(), BatchSizes(4, 1), None, in_background=True).render(
        paint(str(k), steps=4) for k in count()
    )
    assert isinstance(next(outcomes), RenderedImage)
    outcomes.close()  # type: ignore[attr-defined]
    assert active_count() == threads


# Memory


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(
    ("device", "final_sizes"),
    [
        (MemoryLimitedPainter(slots=5), (4, 4)),
        (MemoryLimitedPainter(decode=1), (16, 1)),
        (MemoryLimitedPainter(slots=3, decode=2), (2, 2)),
    ],
    ids=["few slots", "few images", "few of both"],
)
def test_out_of_memory_halves_a_batch_and_loses_no_row(
    device: MemoryLimitedPainter, final_sizes: tuple[int, int], in_background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [paint(str(k), 0.1 * k, steps=4 + k % 3, guidance=1 + k % 2, seed=k) for k in range(30)]
    chain = StepLevelChain(device, BatchSizes(16, 4), None, in_background=in_background)
    outcomes = list(chain.render(rows))
    assert Counter(outcome.request.id for outcome in outcomes) == Counter(row.id for row in rows)
    assert all(isinstance(outcome, RenderedImage) for outcome in outcomes)
    assert chain.batch_sizes.for_size((16, 16)) == final_sizes
    assert {outcome.slots for outcome in outcomes if isinstance(outcome, RenderedImage)} <= {final_sizes[0], 16}
    assert "out of memory at 16x16 pixels: continuing with" in caplog.text
    # Batches stay halved for later rows of this size, and for no other size.
    list(chain.render([paint("later", steps=4)]))
    assert chain.batch_sizes.for_size((16, 16)) == final_sizes
    assert chain.batch_sizes.for_size((16, 24)) == (16, 4)


def test_a_unet_call_that_runs_out_of_memory_is_not_counted() -> None:
    class Counting(MemoryLimitedPainter):
        calls = 0

        def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
            prediction = super().denoise(sample, timestep, context)
            self.calls += 1
            return prediction

    device = Counting(slots=5)
    chain = StepLevelChain(device, BatchSizes(16, 4), None)
    list(chain.render(paint(str(k), steps=4, seed=k) for k in range(12)))
    assert chain.stages.ticks == device.calls


def test_out_of_memory_later_keeps_finished_rows() -> None:
    device = MemoryLimitedPainter(slots=8)
    chain = StepLevelChain(device, BatchSizes(8, 1), None)
    outcomes = chain.render(paint(str(k), steps=4, guidance=1.0, seed=k) for k in range(40))
    early = list(islice(outcomes, 10))
    device.max_slots = 4
    late = list(outcomes)
    names = [outcome.request.id for outcome in (*early, *late)]
    assert sorted(names, key=int) == [str(k) for k in range(40)]
    slots = [outcome.slots for outcome in (*early, *late) if isinstance(outcome, RenderedImage)]
    assert slots == sorted(slots, reverse=True)
    assert set(slots) == {8, 4}
    alone = run([paint("9", steps=4, guidance=1.0, seed=9)], slots=4)[1][0]
    (same,) = (outcome for outcome in (*early, *late) if outcome.request.id == "9")
    assert isinstance(alone, RenderedImage)
    assert isinstance(same, RenderedImage)
    assert np.array_equal(alone.pixels, same.pixels)


def test_a_size_that_does_not_fit_into_memory_fails_only_its_rows() -> None:
    class Narrow(Painter):
        def denoise(self, sample: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
            if sample.shape[-1] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().denoise(sample, timestep, context)

    rows = [paint(str(k), steps=4, size=(16, 24 if k % 2 else 16)) for k in range(8)]
    outcomes = list(StepLevelChain(Narrow(), BatchSizes(4, 2), None).render(rows))
    assert Counter(outcome.request.id for outcome in outcomes) == Counter(row.id for row in rows)
    for outcome in outcomes:
        if outcome.request.params.width == 16:
            assert isinstance(outcome, RenderedImage)
        else:
            assert isinstance(outcome, UnrenderedRow)
            assert outcome.status == "failed"
            reason = "does not fit into the device's memory (CUDA out of memory)"
            assert outcome.error == f"one image of 24x16 pixels {reason}"


def test_slots_that_do_not_fit_into_memory_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_slots(model: Any, size: int, *rest: Any) -> Any:
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Slots(model, size, *rest)

    monkeypatch.setattr("batch_infer.chain.packed.Slots", make_slots)
    chain = StepLevelChain(Painter(), BatchSizes(8, 1), None)
    outcomes = list(chain.render(paint(str(k), steps=4) for k in range(5)))
    assert [type(outcome) for outcome in outcomes] == [RenderedImage] * 5
    assert chain.batch_sizes.for_size((16, 16)) == (2, 1)


def test_rows_fail_if_not_even_the_smallest_slots_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_slots(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("batch_infer.chain.packed.Slots", make_slots)
    outcomes = list(StepLevelChain(Painter(), BatchSizes(8, 2), None).render(paint(str(k)) for k in range(3)))
    assert [(outcome.request.id, type(outcome)) for outcome in outcomes] == [(str(k), UnrenderedRow) for k in range(3)]


@pytest.mark.parametrize(
    ("batch_sizes", "stage", "min_slots", "smaller"),
    [
        ((32, 8), "denoise", 2, (16, 8)),
        ((32, 8), "decode", 2, (32, 4)),
        ((32, 1), "decode", 2, (16, 1)),
        ((3, 8), "denoise", 2, (3, 4)),
        ((2, 1), "denoise", 2, None),
        ((3, 8), "denoise", 1, (1, 8)),
        ((2, 1), "decode", 1, (1, 1)),
        ((1, 2), "denoise", 1, (1, 1)),
        ((1, 1), "denoise", 1, None),
    ],
)
def test_the_batch_of_the_failed_stage_is_halved_if_possible(
    batch_sizes: tuple[int, int], stage: Any, min_slots: int, smaller: tuple[int, int] | None
) -> None:
    smaller_sizes = BatchSizes(*batch_sizes).halve((64, 64), stage, min_slots)
    assert (smaller_sizes and smaller_sizes.for_size((64, 64))) == smaller


def test_an_image_size_may_have_its_own_batch_sizes() -> None:
    painter = Painter()
    chain = StepLevelChain(painter, BatchSizes(4, 2, {(16, 24): (6, 3)}), None)
    list(chain.render([paint(str(k), steps=4, size=(16, 16 + 8 * (k > 1))) for k in range(4)]))
    assert set(painter.decoded) == {(2, 3, 2, 2), (3, 3, 2, 3)}
    assert chain.stages_by_size[16, 24].slot_ticks == 6 * chain.stages_by_size[16, 24].ticks
