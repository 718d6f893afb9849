"""Render the pending rows of a mini-batch, so that a row that crashes its process does not fail other rows.

Markers in OUT list rows that a worker may be rendering. They remain if the worker's process dies.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from secrets import token_hex
from threading import Lock

from batch_infer.azureml.deployment import AzureDeployment
from batch_infer.errors import BatchInferError
from batch_infer.jobs import Job
from batch_infer.manifest import Manifest, ManifestIndex
from batch_infer.planning import order_requests
from batch_infer.records import PromptRequest, ResultRow, digest
from batch_infer.sinks import make_sink
from batch_infer.store import (
    LocalStore,
    atomic_write,
    host_id,
    is_abandoned,
    list_names,
    read_errors,
    unique_name,
    write_errors,
)
from batch_infer.worker import Worker, WorkerSettings, format_worker_name, load_chain, make_row

MARKER_ROWS = 32
"""Maximum number of rows per marker."""
RETRY_ROWS = 16
"""Maximum number of rows that are retried together after a crash."""
MAX_CRASHES = 3
"""Number of crashes after which a row fails, if it was the only row in progress in one of them."""
_PREFIX = ".begun-"

Key = tuple[str, int]


class MiniBatchRenderer:
    """Renders and commits rows with a loaded model."""

    def __init__(self, deployment: AzureDeployment, store: LocalStore) -> None:
        """Load the model. Raises ModelError, SettingsError, StorageError."""
        self._chain = load_chain(deployment.card, deployment.compute, deployment.settings.safety)
        self._store, self._manifest, self.markers = store, Manifest(store), ProgressMarkers(store.root)
        self._failed: set[Key] = set()
        """Rows that this process has committed as failed after crashes."""

    def close(self) -> None:
        self._chain.close()

    def render(self, job: Job, requests: Iterable[PromptRequest], index: ManifestIndex) -> None:
        """Render and commit requests. Rows that failed or were in progress in a crash come last, in smaller groups.

        After too many crashes, rows are committed as failed without rendering. Raises StorageError, and the errors of a
        safety service.
        """
        history = self.markers.read_crashes()
        suspects: list[tuple[PromptRequest, int]] = []

        def unsuspected() -> Iterator[PromptRequest]:
            for request in requests:
                failures = _count_failures(request, index)
                if failures and request.key in self._failed:
                    continue
                if failures or request.key in history.counts:
                    suspects.append((request, failures))
                else:
                    yield request

        self._render(job, unsuspected())
        failed, groups = history.group(suspects)
        if failed:
            self._commit_failed(job, failed)
        for group in groups:
            self._render(job, group, is_alone=len(group) == 1)

    def _render(self, job: Job, requests: Iterable[PromptRequest], *, is_alone: bool = False) -> None:
        card, compute, settings = job.card, job.compute, job.settings
        worker_settings = WorkerSettings(
            card, compute, settings.safety, settings.output, self._store.address, job.tables.carried
        )
        worker = Worker(worker_settings, format_worker_name(0), lambda *_: self._chain)
        ordered = order_requests(requests, lambda size: compute.shape_of(*size).slots)
        with self.markers:
            marked = self.markers.mark(ordered, is_alone=is_alone)
            worker.render(marked, self.markers.record_committed)

    def _commit_failed(self, job: Job, requests: Sequence[PromptRequest]) -> None:
        error = f"rendering crashed {MAX_CRASHES} times with this row in progress, the last time with no other row"
        worker, scheduler = format_worker_name(0), job.card.scheduler_name
        rows = [make_row(request, "failed", error, scheduler=scheduler, worker=worker) for request in requests]
        self._manifest.commit(rows, job.tables.carried)
        self._failed.update(request.key for request in requests)
        for request in requests:
            if request.replaces:
                make_sink(self._store).remove(request.replaces)


def _count_failures(request: PromptRequest, index: ManifestIndex) -> int:
    """Return how often this row has failed before, or 0 if it has changed since."""
    entry = index.find(request.key) if request.attempt > 1 else None
    return entry.failures if entry and entry.fingerprint == request.fingerprint else 0


@dataclass(frozen=True, slots=True)
class CrashHistory:
    """The number of crashes in which each row may have been in progress, and the rows that were alone in a crash."""

    counts: Counter[Key] = field(default_factory=Counter)
    alone: set[Key] = field(default_factory=set)

    def group(
        self, suspects: Iterable[tuple[PromptRequest, int]]
    ) -> tuple[list[PromptRequest], list[Sequence[PromptRequest]]]:
        """Return the rows to commit as failed, and the groups in which to retry the other rows, least suspect first.

        Each suspect is a row and the number of its earlier `failed` results. A row with such results is retried alone.
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
    """The in-progress markers in OUT. On exit, the context manager removes those of this worker that are still open.

    If a row may have caused an error, it instead keeps them under names that count as those of a crash.

    A marker does not say which rows are finished. After a crash, it remains until the manifest has a result for each of
    its rows, so that the worker that retries them knows of the crash. A marker does not identify the row that crashed
    the process, and does not say whether the process was killed from outside. Therefore rows are retried in smaller
    groups, and a row fails only after a crash in which it was alone.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._lock = out, Lock()
        self._open: dict[Path, set[Key]] = {}
        """The uncommitted keys of each open marker, by the marker's path."""

    def mark(self, requests: Iterable[PromptRequest], *, is_alone: bool = False) -> Iterator[PromptRequest]:
        """Yield requests, each after its marker is written. Raises StorageError.

        `is_alone`: no other row is in progress.
        """
        source = iter(requests)
        while rows := list(islice(source, MARKER_ROWS)):
            keys = [row.key for row in rows]
            path = self._out / unique_name(_PREFIX, digest(keys))
            with atomic_write(path, flush=False, parents=False) as temporary:
                temporary.write_text(json.dumps({"alone": is_alone, "keys": keys}), "ascii")
            with self._lock:
                self._open[path] = set(keys)
            yield from rows

    def record_committed(self, rows: Sequence[ResultRow]) -> None:
        """Remove the markers whose rows are all committed."""
        keys = {row.key for row in rows}
        with self._lock:
            for path, remaining in list(self._open.items()):
                remaining -= keys
                if not remaining:
                    self._remove(path)

    def __enter__(self) -> None:
        pass

    def __exit__(self, exc_type: object, error: BaseException | None, traceback: object) -> None:
        """Remove the open markers. If a row may have caused the error, rename them so that they count as a crash."""
        with self._lock:
            for path in list(self._open):
                if error is None or isinstance(error, BatchInferError):  # a service or a disk has failed
                    self._remove(path)
                else:
                    del self._open[path]
                    with write_errors(path), suppress(FileNotFoundError):
                        path.replace(path.with_name(f"{_PREFIX}broken-{token_hex(6)}"))

    def _remove(self, path: Path) -> None:
        self._open.pop(path, None)
        with write_errors(path):
            path.unlink(missing_ok=True)

    def read_crashes(self) -> CrashHistory:
        """Return the history of crashes on this machine and possible crashes on other machines. Raises StorageError."""
        history = CrashHistory()
        for _, is_alone, keys in self._read_markers():
            history.counts.update(keys)
            if is_alone:
                history.alone.update(keys)
        return history

    def remove_settled(self, index: ManifestIndex) -> None:
        """Remove each marker of a process that may have died if the index has all its rows. Raises StorageError."""
        for path, _, keys in self._read_markers():
            if all(index.find(key) for key in keys):
                self._remove(path)

    def _read_markers(self) -> Iterator[tuple[Path, bool, list[Key]]]:
        """Yield the markers of processes that may have died. Raises StorageError if a marker cannot be read."""
        own_prefix = f"{_PREFIX}{host_id()}-"
        for name in list_names(self._out):
            path = self._out / name
            if not name.startswith(_PREFIX) or (name.startswith(own_prefix) and not is_abandoned(name, _PREFIX)):
                continue
            # Another worker may remove the marker meanwhile, and other programs' files may have such names.
            with read_errors(path), suppress(FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
                marker = json.loads(path.read_text("ascii"))
                yield path, bool(marker["alone"]), [(str(name), int(k)) for name, k in marker["keys"]]
