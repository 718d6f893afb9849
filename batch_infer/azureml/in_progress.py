"""Markers in OUT of the rows that a worker is rendering, which remain if its process dies."""

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

MARKER_ROWS = 32
"""Rows that share a marker."""
RETRY_ROWS = 16
"""Rows that are retried together after a crash."""
MAX_CRASHES = 3
"""A row that was in progress in this many crashes, in the last one alone, has failed."""
_PREFIX = ".begun-"

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class CrashHistory:
    """How often each row was in progress when work was aborted, and which rows were alone then."""

    counts: Counter[Key] = field(default_factory=Counter)
    alone: set[Key] = field(default_factory=set)

    def group(
        self, suspects: Iterable[tuple[PromptRequest, int]]
    ) -> tuple[list[PromptRequest], list[Sequence[PromptRequest]]]:
        """Return the rows that have failed, and groups in which to retry the others, least suspect ones first.

        Each suspect comes with the number of its earlier `failed` results. A row with any is retried alone.
        """
        failed: list[PromptRequest] = []
        together: list[PromptRequest] = []
        alone: list[Sequence[PromptRequest]] = []
        for request, failures in suspects:
            crashes = self.counts[request.key] + (MAX_CRASHES - 1) * bool(failures)
            if crashes >= MAX_CRASHES and request.key in self.alone:
                failed.append(request)
            elif crashes < MAX_CRASHES - 1:
                together.append(request)
            else:
                alone.append([request])
        alone.sort(key=lambda rows: rows[0].key in self.alone)
        return failed, [*(together[k : k + RETRY_ROWS] for k in range(0, len(together), RETRY_ROWS)), *alone]


class ProgressMarkers:
    """The in-progress markers of one OUT.

    A marker says nothing about what is done: it is removed once the manifest holds its rows. Markers of rows that get
    no result remain for the worker that retries them. A marker cannot tell which of its rows crashed the process, or
    whether it was killed from outside. So rows are retried in smaller groups, and a row counts as failed only after a
    crash in which it was alone.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._lock = out, Lock()
        self._open: dict[Path, set[Key]] = {}

    def mark(self, requests: Iterable[PromptRequest], *, alone: bool = False) -> Iterator[PromptRequest]:
        """Yield requests, each after its marker is written. Raises StorageError.

        `alone`: nothing else is in progress.
        """
        source = iter(requests)
        while rows := list(islice(source, MARKER_ROWS)):
            keys = [row.key for row in rows]
            path = self._out / unique_name(_PREFIX, digest(keys))
            with atomic_write(path, flush=False, parents=False) as temporary:
                temporary.write_text(json.dumps({"alone": alone, "keys": keys}), "ascii")
            with self._lock:
                self._open[path] = set(keys)
            yield from rows

    def record_committed(self, rows: Sequence[ResultRow]) -> None:
        """Remove the markers of which all rows are committed."""
        keys = {row.key for row in rows}
        with self._lock:
            for path, remaining in list(self._open.items()):
                remaining -= keys
                if not remaining:
                    self._remove(path)

    def close(self, *, crashed: bool) -> None:
        """Remove the open markers, or keep them if the work has `crashed`, though this process lives on."""
        with self._lock:
            for path in list(self._open):
                if crashed:
                    del self._open[path]
                    with write_errors(path), suppress(FileNotFoundError):
                        path.replace(path.with_name(f"{_PREFIX}broken-{token_hex(6)}"))
                else:
                    self._remove(path)

    def _remove(self, path: Path) -> None:
        del self._open[path]
        with write_errors(path):
            path.unlink(missing_ok=True)

    def read_crashes(self) -> CrashHistory:
        """Return the crashes of processes on this machine, and those that may have happened on others."""
        history = CrashHistory()
        for _, alone, keys in self._read_markers():
            history.counts.update(keys)
            if alone:
                history.alone.update(keys)
        return history

    def remove_settled(self, is_settled: Callable[[Key], bool]) -> None:
        """Remove markers of dead processes whose rows other workers have committed. Raises StorageError."""
        for path, _, keys in self._read_markers():
            if all(map(is_settled, keys)):
                with write_errors(path):
                    path.unlink(missing_ok=True)

    def _read_markers(self) -> Iterator[tuple[Path, bool, list[Key]]]:
        """Yield the markers of processes that may have died. Raises StorageError where one cannot be read."""
        own_prefix = f"{_PREFIX}{host_id()}-"
        for name in list_names(self._out):
            path = self._out / name
            if not name.startswith(_PREFIX) or (name.startswith(own_prefix) and not is_abandoned(name, _PREFIX)):
                continue
            # A marker may be removed meanwhile, and a file of this name may be no marker.
            with read_errors(path), suppress(FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
                marker = json.loads(path.read_text("ascii"))
                yield path, bool(marker["alone"]), [(str(name), int(k)) for name, k in marker["keys"]]
