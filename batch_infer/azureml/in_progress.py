"""Rows that a worker has begun: a mark in OUT for as long as they are under way, which outlives who dies over them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from secrets import token_hex
from threading import Lock

from batch_infer.records import PromptRequest, ResultRow, digest
from batch_infer.store import atomic_write, host_id, is_abandoned, list_names, read_errors, unique_name, write_errors

TOGETHER = 32
"""Rows that share a mark while all goes well."""
APART = 16
"""Rows that are tried together once a process has died with them."""
STRIKES = 3
"""A row over which work has broken off so often, the last time with it alone, has failed."""
_MARK = ".begun-"

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Deaths:
    """How often work has broken off over a row, and over which rows it has with nothing else under way."""

    times: Counter[Key] = field(default_factory=Counter)
    alone: set[Key] = field(default_factory=set)

    def parted(
        self, struck: Iterable[tuple[PromptRequest, int]]
    ) -> tuple[list[PromptRequest], list[Sequence[PromptRequest]]]:
        """Those that have failed, and the groups in which the others are tried, the least suspect ones first.

        Beside each request stands how often it has failed before: such a row is tried alone.
        """
        failed: list[PromptRequest] = []
        company: list[PromptRequest] = []
        alone: list[Sequence[PromptRequest]] = []
        for request, failures in struck:
            strikes = self.times[request.key] + (STRIKES - 1) * bool(failures)
            if strikes >= STRIKES and request.key in self.alone:
                failed.append(request)
            elif strikes < STRIKES - 1:
                company.append(request)
            else:
                alone.append([request])
        alone.sort(key=lambda rows: rows[0].key in self.alone)
        return failed, [*(company[k : k + APART] for k in range(0, len(company), APART)), *alone]


class Begun:
    """The marks in one OUT. A mark says nothing of what is done: it is removed when the manifest holds its rows.

    Those of rows that never come to a result stay, for whoever tries them next.

    Which of its rows brought a process down, and whether it was a row at all or a kill, no mark can tell: so rows are
    tried again in smaller company, and nothing else is held against them until one was alone.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._lock = out, Lock()
        self._open: dict[Path, set[Key]] = {}

    def watched(self, requests: Iterable[PromptRequest], *, alone: bool = False) -> Iterator[PromptRequest]:
        """Requests, each marked before it is handed on; `alone`: nothing else is under way. Raises StorageError."""
        source = iter(requests)
        while rows := list(islice(source, TOGETHER)):
            keys = [row.key for row in rows]
            path = self._out / unique_name(_MARK, digest(keys))
            with atomic_write(path, flush=False, parents=False) as temporary:
                temporary.write_text(json.dumps({"alone": alone, "keys": keys}), "ascii")
            with self._lock:
                self._open[path] = set(keys)
            yield from rows

    def settle(self, rows: Sequence[ResultRow]) -> None:
        """These are committed."""
        keys = {row.key for row in rows}
        with self._lock:
            for path, left in list(self._open.items()):
                left -= keys
                if not left:
                    self._remove(path)

    def leave(self, *, broken: bool) -> None:
        """The work is over. One that has `broken` off counts as a death, though its process lives on; no other does."""
        with self._lock:
            for path in list(self._open):
                if broken:
                    del self._open[path]
                    with write_errors(path), suppress(FileNotFoundError):
                        path.replace(path.with_name(f"{_MARK}broken-{token_hex(6)}"))
                else:
                    self._remove(path)

    def _remove(self, path: Path) -> None:
        del self._open[path]
        with write_errors(path):
            path.unlink(missing_ok=True)

    def deaths(self) -> Deaths:
        """Of processes that have died here, and of those elsewhere of which nobody here can tell."""
        deaths = Deaths()
        for _, alone, keys in self._dead():
            deaths.times.update(keys)
            if alone:
                deaths.alone.update(keys)
        return deaths

    def clear(self, is_settled: Callable[[Key], bool]) -> None:
        """Remove what the dead have left of rows that somebody else has committed since. Raises StorageError."""
        for path, _, keys in self._dead():
            if all(map(is_settled, keys)):
                with write_errors(path):
                    path.unlink(missing_ok=True)

    def _dead(self) -> Iterator[tuple[Path, bool, list[Key]]]:
        """Yield the marks of processes that may have died. Raises StorageError where one cannot be read."""
        for name in list_names(self._out):
            path = self._out / name
            if not name.startswith(_MARK) or (
                name.startswith(f"{_MARK}{host_id()}-") and not is_abandoned(name, _MARK)
            ):
                continue
            with read_errors(path), suppress(FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
                found = json.loads(path.read_text("ascii"))  # else removed meanwhile, or none of ours
                yield path, bool(found["alone"]), [(str(name), int(k)) for name, k in found["keys"]]
