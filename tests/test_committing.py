"""The committer: when rows are committed, and what an error of the disk does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import pytest

from batch_infer.worker import committing
from batch_infer.worker.committing import Committer

PATIENCE = 60.0
"""Seconds before a test gives up waiting for another thread."""


def done(value: int) -> Callable[[], Future[int]]:
    future: Future[int] = Future()
    future.set_result(value)
    return lambda: future


@pytest.fixture
def batches() -> SimpleQueue[list[int]]:
    return SimpleQueue()


def test_rows_are_committed_although_no_other_row_follows(
    batches: SimpleQueue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "COMMIT_SECONDS", 0.01)
    with Committer(batches.put) as committer:
        committer.add(done(1))
        committer.add(done(2))
        found = batches.get(timeout=PATIENCE)
        found += batches.get(timeout=PATIENCE) if len(found) < 2 else []
        assert found == [1, 2]
    assert batches.empty()


def test_a_row_that_is_still_being_stored_does_not_hold_up_those_before_it(
    batches: SimpleQueue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "COMMIT_SECONDS", 0.01)
    slow: Future[int] = Future()
    with Committer(batches.put) as committer:
        committer.add(done(1))
        committer.add(lambda: slow)
        assert batches.get(timeout=PATIENCE) == [1]
        slow.set_result(2)
    assert batches.get(timeout=PATIENCE) == [2]


def test_batches_are_full_where_rows_come_fast(
    batches: SimpleQueue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "COMMIT_SECONDS", 3600.0)
    monkeypatch.setattr(committing, "COMMIT_ROWS", 4)
    with Committer(batches.put) as committer:
        for k in range(10):
            committer.add(done(k))
    assert [batches.get(timeout=PATIENCE) for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_an_error_of_committing_is_raised_where_rows_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "COMMIT_ROWS", 1)

    def fail(_: list[int]) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Committer(fail) as committer:
        for k in range(2 * committing.COMMITTING_AHEAD):  # more than there is room for
            committer.add(done(k))


def test_an_error_of_storing_is_raised_and_what_came_before_is_committed(
    batches: SimpleQueue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "COMMIT_SECONDS", 0.01)
    broken: Future[int] = Future()
    broken.set_exception(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"), Committer(batches.put) as committer:
        committer.add(done(1))
        assert batches.get(timeout=PATIENCE) == [1]
        committer.add(lambda: broken)


def test_leaving_with_an_error_commits_what_was_added(batches: SimpleQueue[list[int]]) -> None:
    with pytest.raises(KeyError), Committer(batches.put) as committer:
        committer.add(done(1))
        raise KeyError
    assert batches.get(timeout=PATIENCE) == [1]
