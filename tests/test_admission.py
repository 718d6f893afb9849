"""Test which waiting rows are admitted to free slots."""

from __future__ import annotations

from batch_infer.admission import WaitingRows


def make_waiting(slots: int, *needed: int) -> WaitingRows[int]:
    """Return waiting rows. Each is the number of slots that it needs."""
    waiting = WaitingRows[int](slots, lambda row: row)
    for row in needed:
        waiting.add(row)
    return waiting


def test_rows_are_admitted_in_their_order_as_far_as_slots_are_free() -> None:
    waiting = make_waiting(8, 2, 1, 2, 2)
    assert waiting.admit(5) == [2, 1, 2]
    assert (len(waiting), waiting.admit(1), waiting.admit(2), len(waiting)) == (1, [], [2], 0)


def test_a_row_that_fits_overtakes() -> None:
    assert make_waiting(8, 2, 1, 1).admit(1) == [1]


def test_a_row_is_overtaken_by_at_most_as_many_rows_as_there_are_slots() -> None:
    waiting = make_waiting(4, 2)
    overtaking = 0
    for _ in range(10):
        waiting.add(1)
        overtaking += len(waiting.admit(1))
    assert overtaking == 4
    assert waiting.admit(2) == [2]
    assert len(make_waiting(4, 4, *[1] * 9).admit(3)) == 3
    waiting = make_waiting(4, 4, 1, 1, 1)
    assert waiting.admit(3) == [1, 1, 1]
    for _ in range(3):
        waiting.add(1)
    assert waiting.admit(3) == [1]


def test_a_row_that_needs_more_than_all_slots_is_admitted_alone() -> None:
    waiting = make_waiting(2, 3, 1)
    assert waiting.admit(1) == [1]
    waiting.add(1)
    assert waiting.admit(2) == [3]
    assert waiting.admit(2) == [1]


def test_as_many_rows_are_prepared_as_there_are_slots() -> None:
    waiting = make_waiting(8)
    assert waiting.room == 8
    waiting.add(1)
    assert waiting.room == 7
    for _ in range(4):
        waiting.add(1)
    assert waiting.room == 0


def test_a_discarded_row_no_longer_waits() -> None:
    rows = [[0], [1]]
    waiting = WaitingRows[list[int]](8, len)
    for row in rows:
        waiting.add(row)
    waiting.discard(rows[0])
    assert waiting.admit(8) == [rows[1]]
