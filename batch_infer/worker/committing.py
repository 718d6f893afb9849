"""Committing: images and rows in one step that a kill cannot split, and a thread that does it by number or by age."""

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
from batch_infer.records import ResultRow
from batch_infer.sinks import FolderSink, backup_path

COMMIT_ROWS = 256
"""Rows in a manifest part."""
COMMIT_SECONDS = 2.0
"""Age of the oldest uncommitted row at which a part is committed.

README promises three seconds; storing the images and flushing them to the disk takes the rest.
"""
STORING_AHEAD = 64
"""Images that wait to be stored. Beyond this the device waits."""
COMMITTING_AHEAD = 4 * COMMIT_ROWS
"""Rows that wait to be committed, in memory without their pixels. Beyond this the device waits."""

Stored = TypeVar("Stored")


def commit_images(
    sink: FolderSink,
    manifest: Manifest,
    rows: Sequence[ResultRow],
    carried: pa.Schema,
    *,
    written: Collection[str],
    former: Collection[str],
) -> None:
    """Give the images that were written their names, commit rows, and remove the former images that no row names.

    A former image whose name another takes is set aside until the rows are committed. Killed before that, the process
    has lost none: `jobs.recovery` brings them back. Raises StorageError.
    """
    new, kept = set(written), {row.generated_image for row in rows}
    replaced = [path for path in former if path in new]
    sink.back_up(replaced)
    sink.publish(written)
    if rows:
        manifest.commit(rows, carried)
    for path in (*(path for path in former if path not in kept), *map(backup_path, replaced)):
        sink.remove(path)


class Committer(Generic[Stored]):
    """Takes rows that are being stored, in order, and commits them in batches on another thread.

    A context manager: leaving it commits what was added. The first error of storing or committing is raised by `add`
    or on leaving; nothing is committed after it.
    """

    def __init__(self, commit: Callable[[list[Stored]], None]) -> None:
        self._commit = commit
        self._queue: queue.SimpleQueue[Future[Stored] | None] = queue.SimpleQueue()
        self._unstored, self._uncommitted = Semaphore(STORING_AHEAD), Semaphore(COMMITTING_AHEAD)
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
        self._unstored.acquire()
        self._uncommitted.acquire()
        if self._running.done():
            self._running.result()
        future = store()
        future.add_done_callback(lambda _: self._unstored.release())
        self._queue.put(future)

    def _run(self) -> None:
        try:
            self._commit_all()
        finally:  # `add` must not wait for a thread that has ended
            self._uncommitted.release(COMMITTING_AHEAD)

    def _commit_all(self) -> None:
        batch: list[Stored] = []
        due: float | None = None
        future: Future[Stored] | None = None
        while True:
            left = None if due is None else due - time.monotonic()
            if len(batch) >= COMMIT_ROWS or (left is not None and left <= 0):
                self._commit_batch(batch)
                due = None
            elif future is None:
                with suppress(queue.Empty):
                    if (future := self._queue.get(timeout=left)) is None:
                        break
            elif wait([future], left).done:
                batch.append(future.result())
                due, future = due or time.monotonic() + COMMIT_SECONDS, None
        if batch:
            self._commit_batch(batch)

    def _commit_batch(self, batch: list[Stored]) -> None:
        self._commit(list(batch))
        self._uncommitted.release(len(batch))
        batch.clear()
