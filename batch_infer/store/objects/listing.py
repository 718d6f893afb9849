"""Walk the objects below a folder in the order of their names."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeAlias

LISTINGS_AHEAD = 8
Sizes: TypeAlias = tuple[dict[str, int], list[str]]
"""The files in a folder with their sizes, and the folders in it."""


def walk_sorted(list_sizes: Callable[[str], Sizes], pool: Executor, folder: str) -> Iterator[tuple[str, int]]:
    """Yield all files at any depth in a folder with their sizes, sorted by name. List a few folders ahead.

    Memory is proportional to the largest folders. Raises the errors of `list_sizes`.
    """
    return _walk(list_sizes(folder), list_sizes, pool)


def _walk(listing: Sizes, list_sizes: Callable[[str], Sizes], pool: Executor) -> Iterator[tuple[str, int]]:
    files, folders = listing
    waiting = deque(sorted(f"{name}/" for name in folders))
    running: deque[Future[Sizes]] = deque()
    for name in sorted([*files, *waiting]):  # with the slash, a folder's files sort as their names do
        if not name.endswith("/"):
            yield name, files[name]
            continue
        while waiting and len(running) < LISTINGS_AHEAD:
            running.append(pool.submit(list_sizes, waiting.popleft()[:-1]))
        yield from _walk(running.popleft().result(), list_sizes, pool)
