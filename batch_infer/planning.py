"""The plan: what is not done yet, in chunks of one size with the dearest rows first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from batch_infer.records import FINAL, MAX_ATTEMPTS, PromptRequest, ResultRow, digest

WINDOW = 8192
"""Requests that are looked at together: memory does not grow with the table."""
CHUNK = 256
"""Requests that a worker claims at once."""


class Committed(Protocol):
    """What the manifest holds of an image."""

    @property
    def status(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def failures(self) -> int: ...
    @property
    def path(self) -> str | None: ...


class Index(Protocol):
    """What is asked of the manifest."""

    def find(self, key: tuple[str, int]) -> Committed | None: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """Requests of one size: the unit that workers claim, named by what it holds."""

    name: str
    requests: tuple[PromptRequest, ...]


def is_done(item: PromptRequest | ResultRow, found: Committed | None) -> bool:
    """Whether a run leaves this item as the manifest has it."""
    if found is None or found.fingerprint != item.fingerprint:
        return False
    if isinstance(item, ResultRow):
        return found.status == item.status
    return found.status in FINAL or (found.status == "failed" and found.failures >= MAX_ATTEMPTS)


def pending(rows: Iterable[PromptRequest | ResultRow], index: Index) -> Iterator[PromptRequest]:
    """The requests that are not done, each as the attempt that it will be; invalid rows are somebody else's."""
    for item in rows:
        if isinstance(item, PromptRequest) and not is_done(item, found := index.find(item.key)):
            yield item if found is None else item.again(found.attempt + 1, found.path)


def chunks(requests: Iterable[PromptRequest]) -> Iterator[Chunk]:
    """Cut requests into chunks, window by window.

    Rows of one size stand together, since a change of size empties the slots. Long rows stand before short ones, so
    that what is left at the end, when slots run empty, is short.
    """
    source = iter(requests)
    while window := sorted(islice(source, WINDOW), key=_order):
        start = 0
        while start < len(window):
            size = _size(window[start])
            piece = tuple(request for request in window[start : start + CHUNK] if _size(request) == size)
            start += len(piece)
            yield Chunk(digest([[request.id, request.image_index, request.fingerprint] for request in piece]), piece)


def _size(request: PromptRequest) -> tuple[int, int]:
    return request.params.height, request.params.width


def _order(request: PromptRequest) -> tuple[object, ...]:
    params = request.params
    return *_size(request), -params.num_inference_steps, not params.guided, request.id, request.image_index
