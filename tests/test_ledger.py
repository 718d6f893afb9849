"""Test that the ledger accounts for every row, even if workers die."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from batch_infer.engines.ledger import CHUNK_ROWS, MAX_DEATHS, RETRY_ROWS, Chunk, Ledger
from batch_infer.records import PromptRequest
from tests.rendering import make_request


def rows(count: int) -> list[PromptRequest]:
    return [make_request(str(k)) for k in range(count)]


def keys(chunk: Chunk | None) -> list[tuple[str, int]]:
    assert chunk is not None
    return [request.key for request in chunk.requests]


def test_chunks_become_shorter_towards_the_end() -> None:
    ledger = Ledger(rows(300), 300, 2)
    lengths = []
    while (chunk := ledger.next_chunk(0)) is not None:
        lengths.append(len(chunk.requests))
    assert sum(lengths) == 300
    assert lengths[0] == CHUNK_ROWS
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1


def test_few_rows_are_shared_by_all_workers() -> None:
    ledger = Ledger(rows(16), 16, 4)
    assert [len(keys(ledger.next_chunk(worker))) for worker in range(4)] == [2] * 4


def test_rows_beyond_the_expected_number_are_assigned_too() -> None:
    ledger = Ledger(rows(10), 3, 2)
    row_count = 0
    while (chunk := ledger.next_chunk(0)) is not None:
        row_count += len(chunk.requests)
    assert row_count == 10


def test_the_ledger_is_done_when_every_row_is_committed() -> None:
    ledger = Ledger(rows(2), 2, 1)
    first, second = keys(ledger.next_chunk(0)), keys(ledger.next_chunk(0))
    assert ledger.next_chunk(0) is None
    assert not ledger.is_done
    assert ledger.commit(first) == set(first)
    assert ledger.commit([*first, *second]) == set(second)
    assert ledger.is_done


def test_a_row_that_kills_workers_is_retried_in_smaller_chunks() -> None:
    ledger = Ledger(rows(40), 80, 1)
    killer, *others = keys(ledger.next_chunk(0))
    assert len(others) == CHUNK_ROWS - 1
    assert ledger.record_death(0) == []
    first_retry = ledger.next_retry(1)
    assert first_retry is not None
    assert first_retry.is_isolated
    assert killer in keys(first_retry)
    assert len(first_retry.requests) == RETRY_ROWS
    assert ledger.record_death(1) == []
    chunks = [ledger.next_retry(2) for _ in range(1 + RETRY_ROWS)]  # the first chunk has the other rows of worker 0
    assert keys(chunks[1]) == [killer]
    (failed,) = (request for request in ledger.record_death(2) if request.key == killer)
    assert failed.key == killer


def test_rows_of_a_worker_that_ended_normally_do_not_fail() -> None:
    ledger = Ledger(rows(4), 100, 1)
    for worker in range(2 * MAX_DEATHS):
        assert len(keys(ledger.next_chunk(worker) or ledger.next_retry(worker))) == 4
        ledger.release(worker)
    last = keys(ledger.next_retry(9))
    assert not ledger.is_done
    assert ledger.commit(last) == set(last)
    assert ledger.next_chunk(9) is None
    assert ledger.is_done


@settings(deadline=None)
@given(st.integers(0, 90), st.integers(1, 4), st.randoms(use_true_random=False))
def test_no_row_is_lost_or_committed_twice(count: int, workers: int, draw: st.randoms) -> None:  # type: ignore[valid-type]
    """Workers take rows at random, and sometimes die before they commit them."""
    ledger = Ledger(rows(count), count, workers)
    held: dict[int, list[tuple[str, int]]] = {worker: [] for worker in range(workers)}
    ends: Counter[tuple[str, int]] = Counter()
    deaths: Counter[tuple[str, int]] = Counter()
    for _ in range(10_000):
        worker = draw.randrange(workers)  # type: ignore[attr-defined]
        if held[worker] and draw.random() < 0.3:  # type: ignore[attr-defined]
            deaths.update(held[worker])
            ends.update(request.key for request in ledger.record_death(worker))
            held[worker] = []
        elif held[worker]:
            ends.update(ledger.commit(held[worker]))
            held[worker] = []
        elif (chunk := ledger.next_chunk(worker) or ledger.next_retry(worker)) is not None:
            held[worker] = keys(chunk)
        elif ledger.is_done:
            break
    assert ledger.is_done
    assert ends == Counter({(str(k), 0): 1 for k in range(count)})
    assert all(number <= MAX_DEATHS for number in deaths.values())
