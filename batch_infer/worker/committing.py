"""Commit rows and their images so that a kill at any time loses no committed image."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from threading import Semaphore
from typing import Generic, TypeVar

import pyarrow as pa

from batch_infer.errors import BatchInferError
from batch_infer.manifest import Manifest, to_table
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.sinks import CommitLimits, Sink, make_sink
from batch_infer.store import open_store
from batch_infer.worker.interface import WorkerSettings
from batch_infer.worker.rows import make_row

COMMIT_ROWS = 256
"""Maximum number of rows that `Committer` commits at once, as one manifest part."""
COMMIT_SECONDS = 2.0
"""Number of seconds after which a batch of stored rows is committed, even if it is not full.

docs/failures.md promises three seconds. The remaining second is for storing images and flushing them to disk.
"""
STORING_AHEAD = 64
"""Maximum number of images that are not stored yet. At this limit, the device waits."""
COMMITTING_AHEAD = 4 * COMMIT_ROWS
"""Maximum number of uncommitted rows. Once stored, they are kept without pixels. At this limit, the device waits."""

Stored = TypeVar("Stored")


def commit_images(
    sink: Sink,
    manifest: Manifest,
    rows: Sequence[ResultRow],
    carried: pa.Schema,
    *,
    written: Collection[str],
    previous: Collection[str],
) -> list[ResultRow]:
    """Move written images to their final paths, commit rows, and remove previous images that no row refers to.

    Return the rows as they were committed.

    If a written image has the path of a previous image, the previous one is backed up until the rows are committed.
    After a kill, `jobs.recovery` restores the backups of images whose replacement was not committed. Raises
    StorageError.
    """
    new_paths, row_paths = set(written), {row.generated_image for row in rows}
    replaced = [path for path in previous if path in new_paths]
    sink.back_up(replaced)
    moved = sink.publish(written, lambda: to_table(rows, carried))
    paths = [row.generated_image and moved.get(row.generated_image, row.generated_image) for row in rows]
    committed = [replace(row, generated_image=path) for row, path in zip(rows, paths, strict=True)]
    if committed:
        manifest.commit(committed, carried)
    sink.remove(*(path for path in previous if path not in row_paths), *map(sink.backup_path, replaced))
    return committed


def commit_failed(
    settings: WorkerSettings, requests: Sequence[PromptRequest], reason: str, worker: str
) -> list[ResultRow]:
    """Commit requests as failed, remove their previous images, and return their rows. Raises StorageError."""
    scheduler = settings.card.scheduler_name
    rows = [make_row(request, "failed", reason, scheduler=scheduler, worker=worker) for request in requests]
    previous = [request.replaces for request in requests if request.replaces]
    store = open_store(settings.out)
    manifest, sink = Manifest(store, settings.run), make_sink(store)
    commit_images(sink, manifest, rows, settings.carried, written=(), previous=previous)
    return rows


class Committer(Generic[Stored]):
    """Commits rows in order and in batches, on its own thread, once their images are stored.

    As a context manager, it commits the remaining rows on exit. After an error in storing or committing, it commits
    nothing more. `add` or the exit raises that error, unless the context ends with an error of another class than
    BatchInferError.
    """

    def __init__(self, commit: Callable[[list[Stored]], None], limits: CommitLimits | None = None) -> None:
        """`limits` overrides COMMIT_ROWS and COMMIT_SECONDS."""
        self._commit, self._limits = commit, limits or CommitLimits(COMMIT_ROWS, COMMIT_SECONDS)
        self._queue: queue.SimpleQueue[Future[Stored] | None] = queue.SimpleQueue()
        self._ahead = max(COMMITTING_AHEAD, 2 * self._limits.rows)
        self._storing_limit, self._committing_limit = Semaphore(STORING_AHEAD), Semaphore(self._ahead)
        self._thread = ThreadPoolExecutor(1, "committing")

    def __enter__(self) -> Committer[Stored]:
        self._running = self._thread.submit(self._run)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._queue.put(None)
        self._thread.shutdown()
        if error is None or isinstance(error, BatchInferError):
            self._running.result()

    def add(self, store: Callable[[], Future[Stored]]) -> None:
        """Wait until the limits allow another row, call `store`, and commit the row once the future is done."""
        self._storing_limit.acquire()
        self._committing_limit.acquire()
        if self._running.done():
            self._running.result()
        future = store()
        future.add_done_callback(lambda _: self._storing_limit.release())
        self._queue.put(future)

    def _run(self) -> None:
        batch: list[Stored] = []
        deadline: float | None = None
        future: Future[Stored] | None = None
        try:
            while True:
                timeout = None if deadline is None else deadline - time.monotonic()
                if len(batch) >= self._limits.rows or (timeout is not None and timeout <= 0):
                    self._commit_batch(batch)
                    deadline = None
                elif future is None:
                    with suppress(queue.Empty):
                        if (future := self._queue.get(timeout=timeout)) is None:
                            break
                elif wait([future], timeout).done:
                    batch.append(future.result())
                    deadline, future = deadline or time.monotonic() + self._limits.seconds, None
            if batch:
                self._commit_batch(batch)
        finally:  # `add` must not wait for a thread that has ended
            self._committing_limit.release(self._ahead)

    def _commit_batch(self, batch: list[Stored]) -> None:
        self._commit(list(batch))
        self._committing_limit.release(len(batch))
        batch.clear()
