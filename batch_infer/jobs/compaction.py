"""Combine the small manifest parts of a run while it renders and before it merges."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor

from batch_infer.errors import StorageError
from batch_infer.jobs.checksums import find_changed_parts, read_checksums
from batch_infer.manifest import Manifest
from batch_infer.store import Store

COMPACTION_PARTS = 256
"""Number of new parts after which small parts are combined.

A worker commits at least one part every two seconds, so that a run of days would leave hundreds of thousands of parts.
"""

log = logging.getLogger("batch_infer")


class Compaction:
    """Combines the parts that a run commits, on a separate thread.

    The caller holds the lock of OUT, and no other index of the manifest reads rows at the same time. Errors of the
    storage are logged as warnings, because many small parts are only slower.
    """

    def __init__(self, manifest: Manifest, first_active_run: int) -> None:
        """`first_active_run` is the first run that recovery would check after a kill."""
        self._manifest, self._first_active_run = manifest, first_active_run
        self._new_parts = 0
        self._thread = ThreadPoolExecutor(1, "compaction")
        self._running: Future[None] | None = None

    def count_part(self) -> None:
        """Count a new part, and start to combine small parts if there are COMPACTION_PARTS new ones."""
        self._new_parts += 1
        if self._new_parts >= COMPACTION_PARTS and (self._running is None or self._running.done()):
            self._new_parts = 0
            self._running = self._thread.submit(self._compact_new_parts)

    def finish(self) -> None:
        """Wait until the thread is idle, and combine small parts if there are more than COMPACTION_PARTS parts.

        A part that no longer matches SHA256SUMS is left unchanged, so that `verify` reports it. Raises StorageError if
        the folder cannot be listed.
        """
        self.wait()
        if len(self._manifest.parts()) > COMPACTION_PARTS:
            self._compact(find_changed_parts)

    def wait(self) -> None:
        """Wait until the thread is idle."""
        if self._running is not None:
            self._running.result()

    def close(self) -> None:
        """Wait until the thread is idle, and end it, because the lock of OUT is released next."""
        self._thread.shutdown()

    def _compact_new_parts(self) -> None:
        """Combine the parts that SHA256SUMS does not list yet. Parts of earlier runs are left to `finish`."""
        self._compact(lambda store: {name.rpartition("/")[2] for name in read_checksums(store)})

    def _compact(self, find_excluded: Callable[[Store], Container[str]]) -> None:
        try:
            excluded = find_excluded(self._manifest.store)
            removed = self._manifest.compact(self._first_active_run, excluded)
        except StorageError as error:
            log.warning("small manifest parts were not combined, which only makes later commands slower: %s", error)
        else:
            log.debug("manifest parts were combined; there are %d fewer now", removed)
