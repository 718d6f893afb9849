"""The ledger: every row is with one worker, waits, or is settled, whoever dies."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from batch_infer.engines.ledger import CHUNK_ROWS, MAX_DEATHS, RETRY_ROWS, Chunk, Ledger
from batch_infer.records import PromptRequest
from tests.rendering import make_request


def rows(number: int) -> list[PromptRequest]:
    return [make_request(str(k)) for k in range(number)]


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


def test_more_rows_than_were_expected_are_handed_out_too() -> None:
    ledger = Ledger(rows(10), 3, 2)
    handed = 0
    while (chunk := ledger.next_chunk(0)) is not None:
        handed += len(chunk.requests)
    assert handed == 10


def test_it_is_over_when_every_row_is_settled() -> None:
    ledger = Ledger(rows(2), 2, 1)
    first, second = keys(ledger.next_chunk(0)), keys(ledger.next_chunk(0))
    assert ledger.next_chunk(0) is None
    assert not ledger.is_done
    assert ledger.commit(first) == set(first)
    assert ledger.commit([*first, *second]) == set(second)
    assert ledger.is_done


def test_a_row_that_three_workers_die_with_is_tried_in_smaller_company_each_time() -> None:
    ledger = Ledger(rows(40), 80, 1)
    (killer, *others) = keys(ledger.next_chunk(0))
    assert len(others) == CHUNK_ROWS - 1
    assert ledger.record_death(0) == []
    company = ledger.next_retry(1)
    assert company is not None
    assert company.isolated
    assert killer in keys(company)
    assert len(company.requests) == RETRY_ROWS
    assert ledger.record_death(1) == []
    alone = [ledger.next_retry(2) for _ in range(1 + RETRY_ROWS)]  # those that were not in it come first
    assert keys(alone[1]) == [killer]
    (failed,) = (request for request in ledger.record_death(2) if request.key == killer)
    assert failed.key == killer


def test_what_a_worker_hands_back_is_not_held_against_its_rows() -> None:
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
def test_no_row_is_lost_or_done_twice_whoever_dies(number: int, workers: int, draw: st.randoms) -> None:  # type: ignore[valid-type]
    """Workers that take what there is, and at times die with it."""
    ledger = Ledger(rows(number), number, workers)
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
    assert ends == Counter({(str(k), 0): 1 for k in range(number)})
    assert all(count <= MAX_DEATHS for count in deaths.values())
