"""The chain: every request comes out once, as an image or as a reason, whatever its neighbours are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice, pairwise
from pathlib import Path
from threading import active_count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_infer.chain import BatchSizes, Rendered, StepLevelChain, Unrendered
from batch_infer.diffusion import Context
from batch_infer.planning import StepBatchingEstimator
from batch_infer.records import PromptRequest, Verdict
from batch_infer.safety.checker import StableDiffusionChecker
from tests.fakes import Painter, Recorder, Small, paint
from tests.rendering import load_family, make_request, render

REFUSED_STEPS = 3
"""What the painter's scheduler does not take."""


def run(
    requests: Sequence[PromptRequest], slots: int = 4, decode: int = 2
) -> tuple[StepLevelChain, list[Rendered | Unrendered]]:
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
def test_every_request_comes_out_once(rows: list[Any], slots: int, decode: int) -> None:
    requests = [
        paint(str(k), colour, steps=steps, guidance=guidance, rescale=rescale, size=size)
        for k, (steps, guidance, rescale, colour, size) in enumerate(rows)
    ]
    chain, outcomes = run(requests, slots, decode)
    assert Counter(outcome.request.id for outcome in outcomes) == Counter(request.id for request in requests)
    for outcome in outcomes:
        params = outcome.request.params
        refused = params.num_inference_steps <= REFUSED_STEPS
        if isinstance(outcome, Rendered):
            assert outcome.request.prompt != "nan"
            assert not refused
            assert outcome.pixels.shape == (params.height, params.width, 3)
            assert outcome.pixels.dtype == np.uint8
        else:
            assert (outcome.status == "invalid") == refused
            assert refused or outcome.request.prompt == "nan"
    painter: Any = chain.model
    assert set(painter.decoded) <= {(decode, 3, 2, 2), (decode, 3, 2, 3)}  # one padded shape a size


def test_an_image_depends_on_its_row_alone(sd1_folder: Path) -> None:
    """Law 1, bytes and verdict: alone, or in a crowd of any order, beside other sizes, steps and guidance."""
    model = load_family(sd1_folder, with_checker=True)
    judge = StableDiffusionChecker(model.safety_checker, model.feature_extractor, batch=2)
    rows = [make_request("guided", "a red circle", steps=6, seed=5)]
    rows += [make_request("unguided", "two blue squares", steps=5, guidance=1.0, seed=6)]
    rows += [make_request("rescaled", "a star", steps=4, rescale=0.7, negative="green", seed=7)]
    crowd = [
        make_request(f"other {k}", f"{k} rings", steps=4 + k % 5, guidance=1 + k % 3, rescale=k % 2, seed=k, size=size)
        for k, size in enumerate([(64, 64)] * 6 + [(64, 96)] * 2)
    ]
    alone = {row.id: render(model, [row], judge=judge)[row.id] for row in rows}
    for order in ([*rows, *crowd], [*crowd, *rows], [*crowd[:3], rows[2], *crowd[3:6], rows[1], rows[0], *crowd[6:]]):
        together = render(model, order, judge=judge)
        for name, wanted in alone.items():
            assert np.array_equal(together[name].pixels, wanted.pixels)
            assert together[name].verdict == wanted.verdict


def test_a_step_count_that_the_scheduler_refuses_costs_its_own_row_only() -> None:
    _, outcomes = run([paint("few", steps=REFUSED_STEPS), paint("fine", steps=5), paint("fewer", steps=1)])
    found = {outcome.request.id: outcome for outcome in outcomes}
    assert isinstance(found["fine"], Rendered)
    for name, steps in (("few", 3), ("fewer", 1)):
        refused = found[name]
        assert isinstance(refused, Unrendered)
        assert refused.status == "invalid"
        assert f"num_inference_steps={steps}" in refused.error


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float32, False), (torch.float16, True)])
def test_values_that_are_not_finite_are_no_image(dtype: torch.dtype, advice: bool) -> None:
    rows = [paint("broken", float("nan"), steps=4, guidance=7.5), paint("fine", steps=4)]
    outcomes = list(StepLevelChain(Painter(dtype), BatchSizes(4, 2), Recorder()).render(rows))
    found = {outcome.request.id: outcome for outcome in outcomes}
    broken = found["broken"]
    assert isinstance(broken, Unrendered)
    assert broken.status == "failed"
    assert "not finite at 4 steps and guidance_scale 7.5" in broken.error
    assert ("--dtype float32" in broken.error) == advice
    assert isinstance(found["fine"], Rendered)


def test_occupancy_counts_row_forwards_over_slots() -> None:
    chain, _ = run([paint("one", steps=4, guidance=1.0), paint("two", steps=4, guidance=1.0)], slots=2)
    evaluations = chain.model.solver.table(4).evaluations
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
    """Two guided rows cannot share three slots, but an unguided one can join the first."""
    chain, outcomes = run([paint("a", steps=4), paint("b", steps=4), paint("c", steps=4, guidance=1.0)], slots=3)
    assert {outcome.request.id for outcome in outcomes[:2]} == {"a", "c"}
    assert chain.stages.ticks == 2 * chain.model.solver.table(4).evaluations


def test_stop_finishes_nothing_more() -> None:
    asked = count()
    chain = StepLevelChain(Painter(), BatchSizes(4, 1), None, stop=lambda: next(asked) > 24)
    rows = [paint("short", steps=4), paint("long", steps=500), paint("waiting", steps=4, size=(16, 24))]
    outcomes = list(chain.render(rows))
    assert [outcome.request.id for outcome in outcomes] == ["short"]
    assert isinstance(outcomes[0], Rendered)
    assert chain.stages.ticks < 26


def test_stop_still_gives_what_was_finished() -> None:
    """A finished row that waits for its decoder call to fill is decoded, not lost."""
    asked = count()
    chain = StepLevelChain(Painter(), BatchSizes(4, 4), None, stop=lambda: next(asked) > 24)
    outcomes = list(chain.render([paint("short", steps=4), paint("long", steps=500)]))
    assert [outcome.request.id for outcome in outcomes] == ["short"]


def test_stop_before_the_first_tick_reads_no_more_than_one_row() -> None:
    rows = iter([paint("a"), paint("b"), paint("c")])
    assert list(StepLevelChain(Painter(), BatchSizes(4, 1), None, stop=lambda: True).render(rows)) == []
    assert [row.id for row in rows] == ["b", "c"]


def test_a_table_without_an_end_is_read_as_it_is_rendered() -> None:
    read = count()

    def table() -> Iterator[PromptRequest]:
        for k in read:
            yield paint(str(k), steps=4)

    outcomes = list(islice(StepLevelChain(Painter(), BatchSizes(4, 2), None).render(table()), 10))
    assert len(outcomes) == 10
    assert next(read) <= 10 + 3 * 4


def test_nobody_was_asked_where_there_is_no_judge() -> None:
    _, (outcome,) = run([paint(steps=4)])
    assert isinstance(outcome, Rendered)
    assert outcome.verdict == Verdict(nsfw=None, checker=None, scores=None)


def test_the_judge_is_shown_images_of_one_size_at_most_a_decoder_call_at_once() -> None:
    judge = Recorder()
    rows = [paint(str(k), steps=4, size=(16, 16 + 8 * (k > 4))) for k in range(8)]
    outcomes = list(StepLevelChain(Painter(), BatchSizes(4, 2), judge).render(rows))
    assert all(isinstance(outcome, Rendered) and outcome.verdict.nsfw is False for outcome in outcomes)
    assert all(len(set(shapes)) == 1 and len(shapes) <= 2 for shapes in judge.shown)
    assert sum(map(len, judge.shown)) == 8


def test_a_bug_ends_the_chain() -> None:
    with pytest.raises(ValueError, match="could not convert"):
        list(
            StepLevelChain(Painter(), BatchSizes(4, 2), None).render([make_request(prompt="no colour", size=(16, 16))])
        )


@pytest.mark.parametrize(("slots", "decode"), [(1, 1), (2, 0)])
def test_shapes_in_which_a_row_would_wait_for_ever(slots: int, decode: int) -> None:
    with pytest.raises(ValueError, match="takes two slots"):
        BatchSizes(slots, decode)


@settings(max_examples=40)
@given(rows=st.lists(st.tuples(st.integers(4, 12), st.sampled_from([0.0, 7.5])), min_size=1, max_size=40))
@pytest.mark.promises
def test_the_plan_knows_what_the_rows_take(rows: list[tuple[int, float]]) -> None:
    """Row-forwards to the last one, and calls to within a row: the packer lets rows without guidance pass others."""
    requests = sorted(
        (paint(str(k), steps=steps, guidance=guidance) for k, (steps, guidance) in enumerate(rows)),
        key=lambda item: (-item.params.num_inference_steps, not item.params.uses_guidance),
    )
    chain, outcomes = run(requests, slots=5)
    assert len(outcomes) == len(requests)
    packing = StepBatchingEstimator(lambda _: 5)
    for item in requests:
        packing.add(item, Painter().solver.table(item.params.num_inference_steps).evaluations)
    packing.close()
    (load,) = packing.costs.values()
    assert (load.images, load.row_forwards) == (len(requests), chain.stages.row_forwards)
    longest = max(Painter().solver.table(steps).evaluations for steps, _ in rows)
    assert abs(load.ticks - chain.stages.ticks) <= longest


# Beside the UNet


def test_decoding_beside_the_unet_changes_no_byte(sd1_folder: Path) -> None:
    """As on a GPU, where a thread of its own decodes and checks."""
    model = load_family(sd1_folder, with_checker=True)
    judge = StableDiffusionChecker(model.safety_checker, model.feature_extractor, batch=2)
    rows = [make_request(str(k), f"{k} rings", steps=2 + k % 5, guidance=1 + k % 3, seed=k) for k in range(9)]
    rows += [make_request("wide", "a star", steps=3, size=(64, 96))]
    found = []
    for beside in (False, True):
        chain = StepLevelChain(model, BatchSizes(6, 2), judge, in_background=beside)
        found.append({outcome.request.id: outcome for outcome in chain.render(rows)})
        assert chain.stages.images == len(rows)
        assert chain.stages.check > 0
    assert found[0].keys() == found[1].keys() == {row.id for row in rows}
    for name, here in found[0].items():
        assert isinstance(here, Rendered)
        there = found[1][name]
        assert isinstance(there, Rendered)
        assert np.array_equal(here.pixels, there.pixels)
        assert here.verdict == there.verdict


def test_the_unet_waits_for_a_slow_decoder_and_not_the_memory() -> None:
    class Slow(Painter):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            under_way.append(len(chain.stages_by_size) and chain.stages.ticks)
            return super().decode(latents)

    under_way: list[int] = []
    chain = StepLevelChain(Slow(), BatchSizes(2, 1), None, in_background=True)
    assert len(list(chain.render(paint(str(k), steps=4, guidance=1.0) for k in range(40)))) == 40
    ticks = [later - earlier for earlier, later in pairwise(under_way)]
    each = chain.model.solver.table(4).evaluations
    assert max(ticks) <= 4 * each


def test_an_error_beside_the_unet_ends_the_chain_and_its_thread() -> None:
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


def test_giving_up_ends_the_thread() -> None:
    threads = active_count()
    outcomes = StepLevelChain(Painter(), BatchSizes(4, 1), None, in_background=True).render(
        paint(str(k), steps=4) for k in count()
    )
    assert isinstance(next(outcomes), Rendered)
    outcomes.close()  # type: ignore[attr-defined]
    assert active_count() == threads


# Memory


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("device", "settled"),
    [(Small(slots=5), (4, 4)), (Small(decode=1), (16, 1)), (Small(slots=3, decode=2), (2, 2))],
    ids=["few slots", "few images", "few of both"],
)
def test_out_of_memory_halves_and_loses_nothing(
    device: Small, settled: tuple[int, int], beside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [paint(str(k), 0.1 * k, steps=4 + k % 3, guidance=1 + k % 2, seed=k) for k in range(30)]
    chain = StepLevelChain(device, BatchSizes(16, 4), None, in_background=beside)
    outcomes = list(chain.render(rows))
    assert Counter(outcome.request.id for outcome in outcomes) == Counter(row.id for row in rows)
    assert all(isinstance(outcome, Rendered) for outcome in outcomes)
    assert chain.batch_sizes.of((16, 16)) == settled
    assert {outcome.slots for outcome in outcomes if isinstance(outcome, Rendered)} <= {settled[0], 16}
    assert "out of memory at 16x16 pixels: going on with" in caplog.text
    # What was halved stays so, for rows that come later too, and for no other size.
    list(chain.render([paint("later", steps=4)]))
    assert chain.batch_sizes.of((16, 16)) == settled
    assert chain.batch_sizes.of((16, 24)) == (16, 4)


def test_memory_that_ends_later_keeps_what_is_finished() -> None:
    device = Small(slots=8)
    chain = StepLevelChain(device, BatchSizes(8, 1), None)
    outcomes = chain.render(paint(str(k), steps=4, guidance=1.0, seed=k) for k in range(40))
    early = list(islice(outcomes, 10))
    device.most_slots = 4
    late = list(outcomes)
    names = [outcome.request.id for outcome in (*early, *late)]
    assert sorted(names, key=int) == [str(k) for k in range(40)]
    slots = [outcome.slots for outcome in (*early, *late) if isinstance(outcome, Rendered)]
    assert slots == sorted(slots, reverse=True)
    assert set(slots) == {8, 4}
    alone = run([paint("9", steps=4, guidance=1.0, seed=9)], slots=4)[1][0]
    (same,) = (outcome for outcome in (*early, *late) if outcome.request.id == "9")
    assert isinstance(alone, Rendered)
    assert isinstance(same, Rendered)
    assert np.array_equal(alone.pixels, same.pixels)


def test_a_size_that_no_memory_holds_costs_its_own_rows_only() -> None:
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
            assert isinstance(outcome, Rendered)
        else:
            assert isinstance(outcome, Unrendered)
            assert outcome.status == "failed"
            assert outcome.error == "the device's memory does not hold one image of 24x16 pixels (CUDA out of memory)"


@pytest.mark.parametrize(
    ("shape", "part", "smaller"),
    [
        ((32, 8), "denoise", (16, 8)),
        ((32, 8), "decode", (32, 4)),
        ((32, 1), "decode", (16, 1)),
        ((3, 8), "denoise", (3, 4)),
        ((2, 1), "denoise", None),
    ],
)
def test_batches_shrink_where_it_helps(shape: tuple[int, int], part: Any, smaller: tuple[int, int] | None) -> None:
    found = BatchSizes(*shape).shrunk((64, 64), part)
    assert (found and found.of((64, 64))) == smaller


def test_sizes_have_batches_of_their_own() -> None:
    painter = Painter()
    chain = StepLevelChain(painter, BatchSizes(4, 2, {(16, 24): (6, 3)}), None)
    list(chain.render([paint(str(k), steps=4, size=(16, 16 + 8 * (k > 1))) for k in range(4)]))
    assert set(painter.decoded) == {(2, 3, 2, 2), (3, 3, 2, 3)}
    assert chain.stages_by_size[16, 24].slot_ticks == 6 * chain.stages_by_size[16, 24].ticks
