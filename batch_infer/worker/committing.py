"""Commits of images and rows: one commit survives a kill at any moment; a thread commits by row count or age."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from threading import Semaphore
from types import TracebackType
from typing import Generic, TypeVar

import pyarrow as pa

from batch_infer.manifest import Manifest
from batch_infer.records import PromptRequest, ResultRow
from batch_infer.sinks import Sink, make_sink
from batch_infer.worker.interface import WorkerSettings
from batch_infer.worker.rows import make_row

COMMIT_ROWS = 256
"""Rows in a manifest part."""
COMMIT_SECONDS = 2.0
"""Age of the oldest uncommitted row at which a part is committed.

README promises three seconds; storing the images and flushing them to the disk takes the rest.
"""
STORING_AHEAD = 64
"""Images that may wait to be stored. Beyond this the device waits."""
COMMITTING_AHEAD = 4 * COMMIT_ROWS
"""Rows that may wait to be committed, in memory without their pixels. Beyond this the device waits."""

Stored = TypeVar("Stored")


def commit_images(
    sink: Sink,
    manifest: Manifest,
    rows: Sequence[ResultRow],
    carried: pa.Schema,
    *,
    written: Collection[str],
    previous: Collection[str],
) -> None:
    """Rename the written images to their final paths, commit rows, and remove the previous images that no row names.

    A previous image whose path is reused is set aside until the rows are committed. If the process is killed before,
    none is lost: `jobs.recovery` restores them. Raises StorageError.
    """
    new, kept = set(written), {row.generated_image for row in rows}
    replaced = [path for path in previous if path in new]
    sink.back_up(replaced)
    sink.publish(written)
    if rows:
        manifest.commit(rows, carried)
    for path in (*(path for path in previous if path not in kept), *map(sink.backup_path, replaced)):
        sink.remove(path)


def commit_failed(
    settings: WorkerSettings, requests: Sequence[PromptRequest], reason: str, worker: str
) -> list[ResultRow]:
    """Commit requests as failed, and return their rows. Raises StorageError."""
    scheduler = settings.card.scheduler_name
    rows = [make_row(request, "failed", reason, scheduler=scheduler, worker=worker) for request in requests]
    if rows:
        previous = [request.replaces for request in requests if request.replaces]
        manifest, sink = Manifest(settings.out, settings.run), make_sink(settings.out)
        commit_images(sink, manifest, rows, settings.carried, written=(), previous=previous)
    return rows


class Committer(Generic[Stored]):
    """Queue of rows that are being stored, committed in order and in batches on another thread.

    A context manager: leaving it commits what was added. The first error of storing or committing is raised by `add`
    or on leaving; nothing is committed after it.
    """

    def __init__(self, commit: Callable[[list[Stored]], None]) -> None:
        self._commit = commit
        self._queue: queue.SimpleQueue[Future[Stored] | None] = queue.SimpleQueue()
        self._storing_room, self._committing_room = Semaphore(STORING_AHEAD), Semaphore(COMMITTING_AHEAD)
        self._thread = ThreadPoolExecutor(1, "committing")

    def __enter__(self) -> Committer[Stored]:
        self._running = self._thread.submit(self._run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.shutdown()
        if error is None:
            self._running.result()

    def add(self, store: Callable[[], Future[Stored]]) -> None:
        """Call `store` once there is room for the row, and commit the row when the future is done."""
        self._storing_room.acquire()
        self._committing_room.acquire()
        if self._running.done():
            self._running.result()
        future = store()
        future.add_done_callback(lambda _: self._storing_room.release())
        self._queue.put(future)

    def _run(self) -> None:
        try:
            self._commit_all()
        finally:  # `add` must not wait for a thread that has ended
            self._committing_room.release(COMMITTING_AHEAD)

    def _commit_all(self) -> None:
        batch: list[Stored] = []
        due: float | None = None
        future: Future[Stored] | None = None
        while True:
            seconds = None if due is None else due - time.monotonic()
            if len(batch) >= COMMIT_ROWS or (seconds is not None and seconds <= 0):
                self._commit_batch(batch)
                due = None
            elif future is None:
                with suppress(queue.Empty):
                    if (future := self._queue.get(timeout=seconds)) is None:
                        break
            elif wait([future], seconds).done:
                batch.append(future.result())
                due, future = due or time.monotonic() + COMMIT_SECONDS, None
        if batch:
            self._commit_batch(batch)

    def _commit_batch(self, batch: list[Stored]) -> None:
        self._commit(list(batch))
        self._committing_room.release(len(batch))
        batch.clear()
