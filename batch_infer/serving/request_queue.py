"""Queue the requests of many clients for one chain, and return outcomes to the clients."""

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
"""Maximum time for which rows of the current group overtake rows of other groups."""


@dataclass(slots=True, eq=False)
class Submission:
    """The requests that a client submitted together. `pending` contains the indices of those still waiting."""

    requests: Sequence[PromptRequest]
    pending: deque[int]
    last_turn: float = field(default_factory=time.monotonic)
    outcomes: SimpleQueue[tuple[int, RowOutcome] | BaseException] = field(default_factory=SimpleQueue)
    """Outcomes in the order in which they finish, with the indices of their requests. An exception is always last."""


class RequestQueue:
    """Queues the requests of all clients in round-robin order, so that no client waits for all rows of another.

    Rows with the same `group_key` form a group. A chain renders one group at a time, and empties its slots before the
    next group. Therefore rows of the current group come first, but for at most MAX_WAIT_SECONDS.

    The chain gets no further row once its rows have `limit` denoiser evaluations per step. A chain that reads far ahead
    would delay other clients, and it renders the rows that it has read even if their client disconnects.
    """

    def __init__(self, group_key: Callable[[PromptRequest], object], limit: float = math.inf) -> None:
        self._group_key, self._limit = group_key, limit
        self._lock = Lock()
        self._waiting: deque[Submission] = deque()
        """Submissions with pending requests, least recently served first."""
        self._in_chain: dict[str, tuple[Submission, int]] = {}
        self._current_group: object = None
        self._ids = count()

    def __bool__(self) -> bool:
        """Return whether requests are pending."""
        return bool(self._waiting)

    def submit(self, requests: Sequence[PromptRequest]) -> Submission:
        """Queue the requests of a client, group by group."""
        groups: dict[object, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._group_key(request), []).append(index)
        pending = deque(index for indices in groups.values() for index in indices)
        with self._lock:
            submission = Submission(requests, pending)
            if pending:
                self._waiting.append(submission)
        return submission

    def cancel(self, submission: Submission) -> None:
        """Drop the pending requests of a submission."""
        with self._lock:
            self._drop(submission)

    def poll(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
        """Return the next request, or NOT_YET if none is pending or the chain has enough rows.

        With a timeout, return END instead of NOT_YET. A chain passes a timeout only after finishing all rows that it
        took, so that END means that nothing is pending.
        """
        with self._lock:
            in_chain = sum(submission.requests[index].params.slots for submission, index in self._in_chain.values())
            if not self._waiting or in_chain >= self._limit:
                return NoRequest.END if timeout else NoRequest.NOT_YET
            submission = self._next_submission()
            self._waiting.remove(submission)
            index = submission.pending.popleft()
            submission.last_turn = time.monotonic()
            if submission.pending:
                self._waiting.append(submission)
            request = submission.requests[index]
            self._current_group = self._group_key(request)
            # Different clients may use the same ids. The seed has already been derived from the client's id.
            unique_id = str(next(self._ids))
            self._in_chain[unique_id] = submission, index
            return replace(request, id=unique_id)

    def deliver(self, outcome: RowOutcome) -> None:
        """Pass the outcome of a request to its client."""
        with self._lock:
            submission, index = self._in_chain.pop(outcome.request.id)
        submission.outcomes.put((index, replace(outcome, request=submission.requests[index])))

    def fail(self, error: BaseException, *, include_pending: bool = False) -> bool:
        """Pass an error to the clients with requests in the chain, and drop their pending requests.

        With `include_pending`, also pass it to clients with only pending requests. Return whether any client got it.
        """
        with self._lock:
            failed = {submission for submission, _ in self._in_chain.values()}
            if include_pending:
                failed.update(self._waiting)
            self._in_chain.clear()
            for submission in failed:
                self._drop(submission)
                submission.outcomes.put(error)
        return bool(failed)

    def _next_submission(self) -> Submission:
        first = self._waiting[0]
        if time.monotonic() - first.last_turn <= MAX_WAIT_SECONDS:
            for submission in self._waiting:
                if self._group_key(submission.requests[submission.pending[0]]) == self._current_group:
                    return submission
        return first

    def _drop(self, submission: Submission) -> None:
        submission.pending.clear()
        if submission in self._waiting:
            self._waiting.remove(submission)
