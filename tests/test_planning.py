"""Planning: pending requests are ordered by size, with long rows first, and their cost is estimated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_infer import planning
from batch_infer.planning import BatchingEstimator, SizeCost, is_finished, order_requests, select_pending
from batch_infer.records import (
    FINAL_STATUSES,
    MAX_ATTEMPTS,
    PromptRequest,
    ResultRow,
    RowCost,
    SamplingParams,
    Source,
    utc_now,
)

GUIDANCE = [1.0, 7.5, 7.5, 7.5, 7.5]


@dataclass(frozen=True)
class Entry:
    """A manifest entry of an image."""

    status: str
    fingerprint: str = "f"
    attempt: int = 1
    failures: int = 0
    path: str | None = "images/a.png"


@dataclass(frozen=True)
class FakeIndex:
    """A stand-in for the manifest's index."""

    entries: dict[tuple[str, int], Entry] = field(default_factory=dict)

    def find(self, key: tuple[str, int]) -> Entry | None:
        return self.entries.get(key)


def request(name: str = "a", *, size: int = 64, steps: int = 20, guidance: float = 5.0) -> PromptRequest:
    params = SamplingParams(size, size, steps, guidance, 0.0)
    return PromptRequest(name, 0, "a red circle", None, 1, params, Source("t.csv", 0), "f")


def invalid_row(fingerprint: str = "f") -> ResultRow:
    return ResultRow(
        id="a", image_index=0, prompt="", status="invalid", error="wrong", finished_at=utc_now(), source_file="t.csv",
        source_row=0, fingerprint=fingerprint,
    )  # fmt: skip


@pytest.mark.parametrize("status", ["ok", "flagged", "blocked"])
def test_a_final_row_is_skipped_until_it_changes(status: str) -> None:
    assert status in FINAL_STATUSES
    assert is_finished(request(), Entry(status))
    assert not is_finished(request(), Entry(status, fingerprint="another"))
    assert not is_finished(request(), None)


def test_a_failed_row_is_tried_three_times() -> None:
    finished = [is_finished(request(), Entry("failed", failures=failures)) for failures in range(1, 5)]
    assert finished == [False, False, True, True]
    assert MAX_ATTEMPTS == 3


def test_an_invalid_row_is_recorded_once() -> None:
    assert is_finished(invalid_row(), Entry("invalid"))
    assert not is_finished(invalid_row(), Entry("invalid", fingerprint="another error"))
    assert not is_finished(invalid_row(), Entry("ok"))
    assert not is_finished(request(), Entry("invalid")), "the row has become valid"


def test_pending_requests_name_the_images_that_they_replace() -> None:
    rows: list[PromptRequest | ResultRow] = [
        request("new"),
        request("done"),
        request("changed"),
        invalid_row(),
        request("failed"),
    ]
    index = FakeIndex(
        {
            ("done", 0): Entry("ok"),
            ("changed", 0): Entry("ok", fingerprint="before", attempt=2, path="images/old.png"),
            ("failed", 0): Entry("failed", path=None),
        }
    )
    items = [(item.id, item.attempt, item.replaces) for item in select_pending(rows, index)]
    assert items == [("new", 1, None), ("changed", 3, "images/old.png"), ("failed", 2, None)]


def test_rows_of_one_size_are_adjacent_and_long_ones_come_first() -> None:
    rows = [request(f"{size}-{steps}-{guidance:g}", size=size, steps=steps, guidance=guidance)
            for size in (128, 64) for steps in (5, 50) for guidance in (1.0, 5.0)]  # fmt: skip
    planned = list(order_requests(rows))
    assert [item.id for item in planned[:4]] == ["64-50-5", "64-50-1", "64-5-5", "64-5-1"]
    assert {item.params.height for item in planned[4:]} == {128}


def test_no_rows_give_no_requests() -> None:
    assert list(order_requests([])) == []


def test_requests_are_ordered_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows of the first window are read before the first request."""
    monkeypatch.setattr(planning, "WINDOW", 10)
    read = 0

    def rows() -> Any:
        nonlocal read
        for read in range(1, 10**9):
            yield request(f"{read}")

    plan = order_requests(rows())
    next(plan)
    assert read == 10


shapes = st.tuples(st.sampled_from([64, 72, 128]), st.sampled_from([1, 5, 50]), st.sampled_from([1.0, 5.0]))


@settings(deadline=None)
@given(st.lists(shapes, max_size=60), st.integers(1, 20), st.sampled_from([None, 2, 3, 8]))
def test_every_request_is_ordered_once(rows: list[tuple[int, int, float]], window: int, slots: int | None) -> None:
    requests = [request(f"{i}", size=size, steps=steps, guidance=guidance)
                for i, (size, steps, guidance) in enumerate(rows)]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "WINDOW", window)
        planned = list(order_requests(requests, (lambda _: slots) if slots else None))
    assert sorted(item.id for item in planned) == sorted(item.id for item in requests)
    for start in range(0, len(planned), window):
        sizes = [size for size, _ in groupby(planned[start : start + window], lambda item: item.params.height)]
        assert len(sizes) == len(set(sizes))


# Costs


@pytest.mark.parametrize(("rows", "min_occupancy"), [(200, 0.93), (1000, 0.98), (10_000, 0.99)])
@pytest.mark.parametrize("seed", range(3))
def test_slots_are_full_on_a_mixed_table(rows: int, min_occupancy: float, seed: int) -> None:
    """The table has 20 to 50 steps, three sizes, and one row in five without guidance."""
    draw = random.Random(seed)
    table = [
        request(f"{k}", size=draw.choice([64, 72, 128]), steps=draw.randint(20, 50), guidance=draw.choice(GUIDANCE))
        for k in range(rows)
    ]
    costs = costs_of(list(order_requests(table, lambda _: 32)), slots=32).values()
    assert sum(cost.row_forwards for cost in costs) / sum(32 * cost.ticks for cost in costs) >= min_occupancy


def costs_of(requests: list[PromptRequest], slots: int) -> dict[tuple[int, int], SizeCost]:
    estimator = BatchingEstimator(lambda _: slots)
    for item in requests:
        estimator.add(item, RowCost(item.params.num_inference_steps, item.params.slots))
    estimator.close()
    return estimator.costs


def test_step_batching_is_estimated() -> None:
    rows = [request(steps=20), request(steps=20), request(steps=10, guidance=1.0), request(steps=5)]
    assert costs_of(rows, slots=4) == {
        (64, 64): SizeCost(slots=4, images=4, row_forwards=20 * 2 + 20 * 2 + 10 + 5 * 2, ticks=30)
    }


def test_slots_empty_before_the_size_changes() -> None:
    rows = [request(steps=3), request(steps=3, size=72), request(steps=3)]
    assert costs_of(rows, slots=4) == {(64, 64): SizeCost(4, 2, 12, 6), (72, 72): SizeCost(4, 1, 6, 3)}


def test_rows_that_run_alone_share_no_call() -> None:
    estimator = BatchingEstimator(lambda _: 8)
    for steps in (3, 5):
        estimator.add(request(steps=steps), RowCost(2 * steps, 3, is_alone=True))
    estimator.close()
    assert estimator.costs == {(64, 64): SizeCost(8, images=2, row_forwards=3 * 16, ticks=16)}


def test_a_row_that_needs_more_slots_than_there_are_takes_all() -> None:
    estimator = BatchingEstimator(lambda _: 2)
    for slots in (1, 3, 1):
        estimator.add(request(steps=4), RowCost(4, slots))
    estimator.close()
    assert estimator.costs == {(64, 64): SizeCost(2, images=3, row_forwards=4 * 5, ticks=9)}


def test_a_row_that_needs_fewer_slots_overtakes() -> None:
    rows = [request(steps=4), request(steps=4), request(steps=4, guidance=1.0)]
    assert costs_of(rows, slots=3)[64, 64].ticks == 8


def test_no_rows_cost_nothing() -> None:
    assert costs_of([], slots=4) == {}


def test_a_window_is_also_limited_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "WINDOW_BYTES", 1000)
    read = 0

    def source() -> Iterator[PromptRequest]:
        nonlocal read
        for number in range(100):
            read += 1
            yield replace(request(f"{number}"), carried={"tag": "x" * 300})

    rows = planning.order_requests(source())
    next(rows)
    assert read < 5
    assert sum(1 for _ in rows) == 99
