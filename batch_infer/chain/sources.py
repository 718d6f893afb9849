"""Where a chain gets its requests: sources, and the requests that were read from one before a slot is free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import Enum
from typing import Protocol, TypeAlias, runtime_checkable

from batch_infer.records import PromptRequest

Size: TypeAlias = tuple[int, int]
"""Height and width of an image in pixels."""


class NoRequest(Enum):
    """Why a source returns no request."""

    NOT_YET = "more requests may come"
    END = "no more requests will come"


@runtime_checkable
class RequestSource(Protocol):
    """Supplies a chain with requests."""

    def poll(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
        """Return the next request, END, or NOT_YET if there is none within `timeout` seconds.

        Chains pass a timeout only while they have nothing else to do.
        """
        ...


class IteratorSource:
    """The items of an iterable. `poll` blocks for as long as the iterator does, so it never returns NOT_YET."""

    def __init__(self, requests: Iterable[PromptRequest]) -> None:
        self._requests = iter(requests)

    def poll(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
        return next(self._requests, NoRequest.END)


def as_source(requests: Iterable[PromptRequest] | RequestSource) -> RequestSource:
    return requests if isinstance(requests, RequestSource) else IteratorSource(requests)


def size_of(request: PromptRequest) -> Size:
    return request.params.height, request.params.width


class ReadAhead:
    """Requests that were read from a source and not yet rendered."""

    def __init__(self, source: RequestSource) -> None:
        self._source = source
        self._requests: deque[PromptRequest] = deque()

    def peek(self, timeout: float = 0.0) -> PromptRequest | NoRequest:
        """Return the next request without taking it."""
        if self._requests:
            return self._requests[0]
        polled = self._source.poll(timeout)
        if isinstance(polled, PromptRequest):
            self._requests.append(polled)
        return polled

    def has(self, size: Size) -> bool:
        """Return whether the next request is of this size."""
        request = self.peek()
        return isinstance(request, PromptRequest) and size_of(request) == size

    def take(self, size: Size, limit: int) -> list[PromptRequest]:
        """Take up to `limit` requests, as long as they are of this size."""
        taken: list[PromptRequest] = []
        while len(taken) < limit and self.has(size):
            taken.append(self._requests.popleft())
        return taken

    def put_back(self, requests: Iterable[PromptRequest]) -> None:
        """Put requests back in front of all others, in their order."""
        self._requests.extendleft(reversed(list(requests)))
