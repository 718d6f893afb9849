"""The queue between many clients and one chain: requests to the chain, outcomes back to the clients."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from queue import SimpleQueue
from threading import Lock

from batch_infer.chain import NoRequest, RowOutcome
from batch_infer.records import PromptRequest

MAX_WAIT_SECONDS = 2.0
"""How long rows of the current kind may overtake rows of another kind."""


@dataclass(slots=True, eq=False)
class Submission:
    """The requests that a client submitted together. `pending`: indices of those that the chain has not taken."""

    requests: Sequence[PromptRequest]
    number: int
    pending: deque[int]
    last_turn: float = field(default_factory=time.monotonic)
    outcomes: SimpleQueue[tuple[int, RowOutcome] | BaseException] = field(default_factory=SimpleQueue)
    """Outcomes with the indices of their requests, in the order in which they finish. An exception is the last item."""


class RequestQueue:
    """Requests of all clients in round-robin order, so that no client waits for all rows of another.

    A chain renders rows of one `kind` at a time and empties its slots before it changes the kind, so rows of the
    current kind come first, for MAX_WAIT_SECONDS at most.

    At most `limit` UNet evaluations are handed out and not delivered. A chain that reads far ahead would delay other
    clients, and renders what it has read even if the client disconnects.
    """

    def __init__(self, kind: Callable[[PromptRequest], object], limit: float = math.inf) -> None:
        self._kind, self._limit = kind, limit
        self._lock = Lock()
        self._waiting: deque[Submission] = deque()
        """Submissions with pending requests, least recently served first."""
        self._in_chain: dict[str, tuple[Submission, int]] = {}
        self._current_kind: object = None
        self._numbers = count()

    def __bool__(self) -> bool:
        """Return whether requests are pending."""
        return bool(self._waiting)

    def submit(self, requests: Sequence[PromptRequest]) -> Submission:
        """Queue the requests of a client, grouped by kind."""
        by_kind: dict[object, list[int]] = {}
        for index, request in enumerate(requests):
            by_kind.setdefault(self._kind(request), []).append(index)
        pending = deque(index for indices in by_kind.values() for index in indices)
        with self._lock:
            submission = Submission(requests, next(self._numbers), pending)
            if pending:
                self._waiting.append(submission)
        return submission

    def cancel(self, submission: Submission) -> None:
        """Drop the pending requests of a submission."""
        with self._lock:
            self._drop(submission)

    def poll(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
        """Return the next request, or NOT_YET, since clients may submit requests at any time.

        A chain passes a timeout only if it has finished all that it took. If nothing is pending then, this is the END.
        """
        with self._lock:
            if not self._waiting or self._evaluations_in_chain() >= self._limit:
                return NoRequest.END if timeout else NoRequest.NOT_YET
            submission = self._next_submission()
            self._waiting.remove(submission)
            index = submission.pending.popleft()
            submission.last_turn = time.monotonic()
            if submission.pending:
                self._waiting.append(submission)
            request = submission.requests[index]
            self._current_kind = self._kind(request)
            # Different clients may use the same ids. The seed has already been derived from this one.
            unique_id = f"{submission.number}-{index}"
            self._in_chain[unique_id] = submission, index
            return replace(request, id=unique_id)

    def deliver(self, outcome: RowOutcome) -> None:
        """Pass the outcome of a request to its client."""
        with self._lock:
            submission, index = self._in_chain.pop(outcome.request.id)
        submission.outcomes.put((index, replace(outcome, request=submission.requests[index])))

    def fail(self, error: BaseException, *, pending_too: bool = False) -> bool:
        """Raise an error for clients whose requests are in the chain, and return whether there were any.

        `pending_too`: also for clients whose requests are pending.
        """
        with self._lock:
            failed = {submission.number: submission for submission, _ in self._in_chain.values()}
            if pending_too:
                failed |= {submission.number: submission for submission in self._waiting}
            self._in_chain.clear()
            for submission in failed.values():
                self._drop(submission)
                submission.outcomes.put(error)
        return bool(failed)

    def _evaluations_in_chain(self) -> int:
        """Return the UNet evaluations per step of the requests in the chain."""
        return sum(submission.requests[index].params.slots for submission, index in self._in_chain.values())

    def _next_submission(self) -> Submission:
        first = self._waiting[0]
        if time.monotonic() - first.last_turn > MAX_WAIT_SECONDS:
            return first
        current = (each for each in self._waiting if self._kind(each.requests[each.pending[0]]) == self._current_kind)
        return next(current, first)

    def _drop(self, submission: Submission) -> None:
        submission.pending.clear()
        if submission in self._waiting:
            self._waiting.remove(submission)
