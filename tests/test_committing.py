"""Test when the committer commits rows, and how it raises storage errors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import pytest

from batch_infer.worker import committing
from batch_infer.worker.committing import Committer

TIMEOUT = 60.0
"""Maximum number of seconds that a test waits for another thread."""


def done(value: int) -> Callable[[], Future[int]]:
    future: Future[int] = Future()
    future.set_result(value)
    return lambda: future


@pytest.fixture
def batches() -> SimpleQueue[list[int]]:
    return SimpleQueue()


def test_rows_are_committed_after_a_while_if_no_other_row_follows(
    batches: SimpleQueue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "COMMIT_SECONDS", 0.01)
    with Committer(batches.put) as committer:
        committer.add(done(1))
        committer.add(done(2))
        committed = batches.get(timeout=TIMEOUT)
        committed += batches.get(timeout=TIMEOUT) if len(committed) < 2 else []
        assert committed == [1, 2]
    assert batches.empty()


def test_a_row_that_is_still_being_stored_does_not_delay_earlier_ones(
    batches: SimpleQueue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "COMMIT_SECONDS", 0.01)
    slow: Future[int] = Future()
    with Committer(batches.put) as committer:
        committer.add(done(1))
        committer.add(lambda: slow)
        assert batches.get(timeout=TIMEOUT) == [1]
        slow.set_result(2)
    assert batches.get(timeout=TIMEOUT) == [2]


def test_batches_are_full_if_rows_come_fast(batches: SimpleQueue[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "COMMIT_SECONDS", 3600.0)
    monkeypatch.setattr(committing, "COMMIT_ROWS", 4)
    with Committer(batches.put) as committer:
        for k in range(10):
            committer.add(done(k))
    assert [batches.get(timeout=TIMEOUT) for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_commit_error_is_raised_by_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "COMMIT_ROWS", 1)

    def fail(_: list[int]) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Committer(fail) as committer:
        for k in range(2 * committing.COMMITTING_AHEAD):  # more rows than the queue holds
            committer.add(done(k))


def test_a_storage_error_is_raised_and_earlier_rows_are_committed(
    batches: SimpleQueue[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committing, "COMMIT_SECONDS", 0.01)
    broken: Future[int] = Future()
    broken.set_exception(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"), Committer(batches.put) as committer:
        committer.add(done(1))
        assert batches.get(timeout=TIMEOUT) == [1]
        committer.add(lambda: broken)


def test_leaving_with_an_error_commits_added_rows(batches: SimpleQueue[list[int]]) -> None:
    with pytest.raises(KeyError), Committer(batches.put) as committer:
        committer.add(done(1))
        raise KeyError
    assert batches.get(timeout=TIMEOUT) == [1]
