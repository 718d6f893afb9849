"""The requests of many callers as one stream, which a chain takes rows from, and what came of them on its way back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from queue import SimpleQueue
from threading import Lock
from typing import TypeAlias

from batch_infer.chain import Rendered, Unrendered
from batch_infer.records import PromptRequest

Outcome: TypeAlias = "Rendered | Unrendered"

PATIENCE = 2.0
"""For so many seconds a caller's rows let pass those of others that are of the kind which is being rendered."""


@dataclass(slots=True, eq=False)
class Order:
    """What one caller asks for: which of it waits, and since when it has not had a turn."""

    requests: Sequence[PromptRequest]
    number: int
    waiting: deque[int]
    since: float = field(default_factory=time.monotonic)
    outcomes: SimpleQueue[tuple[int, Outcome] | BaseException] = field(default_factory=SimpleQueue)
    """Each with the request's place, as they come; an exception is the last."""


class Mailbox(Iterator[PromptRequest]):
    """Gives out one row of each caller in turn, so that none waits for all rows of another.

    A chain makes rows of one `kind` at a time, and empties its slots before it goes over to another: so those of the
    kind that it is at go first, for a while. It ends where there is nothing at this moment, and may have more later.

    No more than `most` row-forwards are given out and not delivered: a chain that looks far ahead would make others
    wait, and what it has taken in is rendered for a caller who has gone.
    """

    def __init__(self, kind: Callable[[PromptRequest], object], most: float = math.inf) -> None:
        self._kind, self._most = kind, most
        self._lock = Lock()
        self._orders: deque[Order] = deque()
        """Those of which something waits; first whose last turn is the longest ago."""
        self._given: dict[str, tuple[Order, int]] = {}
        self._last: object = None
        self._numbers = count()

    def __bool__(self) -> bool:
        """Whether something waits."""
        return bool(self._orders)

    def post(self, requests: Sequence[PromptRequest]) -> Order:
        """Take in what a caller asks for."""
        by_kind: dict[object, list[int]] = {}
        for place, request in enumerate(requests):
            by_kind.setdefault(self._kind(request), []).append(place)
        waiting = deque(place for places in by_kind.values() for place in places)
        with self._lock:
            order = Order(requests, next(self._numbers), waiting)
            if waiting:
                self._orders.append(order)
        return order

    def withdraw(self, order: Order) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._drop(order)

    def __next__(self) -> PromptRequest:
        with self._lock:
            if not self._orders or self._out() >= self._most:
                raise StopIteration
            order = self._in_turn()
            self._orders.remove(order)
            place = order.waiting.popleft()
            order.since = time.monotonic()
            if order.waiting:
                self._orders.append(order)
            request = order.requests[place]
            self._last = self._kind(request)
            # Ids of different callers may be the same. The seed has been derived from this one already.
            known = f"{order.number}-{place}"
            self._given[known] = order, place
            return replace(request, id=known)

    def deliver(self, outcome: Outcome) -> None:
        """Let the caller have what came of a request."""
        with self._lock:
            order, place = self._given.pop(outcome.request.id)
        order.outcomes.put((place, replace(outcome, request=order.requests[place])))

    def fail(self, error: BaseException, *, waiting_too: bool = False) -> bool:
        """Tell callers whose rows were given out, or also those whose rows wait, that nothing comes of them.

        False where there are none.
        """
        with self._lock:
            failed = {order.number: order for order, _ in self._given.values()}
            if waiting_too:
                failed |= {order.number: order for order in self._orders}
            self._given.clear()
            for order in failed.values():
                self._drop(order)
                order.outcomes.put(error)
        return bool(failed)

    def _out(self) -> int:
        """Row-forwards that were given out."""
        return sum(order.requests[place].params.slots for order, place in self._given.values())

    def _in_turn(self) -> Order:
        first = self._orders[0]
        if time.monotonic() - first.since > PATIENCE:
            return first
        return next((order for order in self._orders if self._kind_of(order) == self._last), first)

    def _kind_of(self, order: Order) -> object:
        return self._kind(order.requests[order.waiting[0]])

    def _drop(self, order: Order) -> None:
        order.waiting.clear()
        if order in self._orders:
            self._orders.remove(order)
