"""Keep the thumbnails and previews of a gallery under names that depend on their content."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from batch_infer.records import digest
from batch_infer.store import Store, is_temporary, marker_name, temporary_database

FOLDERS = ("thumbs", "previews")
VERSION = 1
"""Increase this if equal images get other thumbnails, so that old ones are replaced."""
PUBLISH_SECONDS = 5.0
"""Publishing fewer pictures at a time takes longer, because the folders of each are flushed to the disk."""
REMOVED_TOGETHER = 1000


def make_name(*key: object) -> str:
    """Return the name of a picture that is determined by these values."""
    name = digest([VERSION, *key])
    return f"{name[:2]}/{name[2:]}.webp"


class Pictures:
    """The pictures of a gallery, by their paths such as thumbs/ab/cdef.webp. Those that are not used are removed.

    Their names are in a temporary database, since there may be millions. Use it in one thread.
    """

    def __init__(self, store: Store) -> None:
        """List the existing pictures, and remove unfinished ones. The caller holds the lock. Raises StorageError."""
        self._store, self._staged = store, list[str]()
        self._published_at = time.monotonic()
        self._database = temporary_database()
        self._database.execute("CREATE TABLE pictures (path PRIMARY KEY, is_used) WITHOUT ROWID")
        unfinished = []
        for path in store.find([*FOLDERS, "data", ""], lambda _: True):
            if is_temporary(path.rpartition("/")[2]) and path != marker_name():
                unfinished.append(path)
            elif path.partition("/")[0] in FOLDERS:
                self._database.execute("INSERT OR IGNORE INTO pictures VALUES (?, 0)", (path,))
        store.remove(unfinished)

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.discard_staged(self._staged)
        self._database.close()

    def has(self, path: str) -> bool:
        """Return whether a picture exists or is staged, and mark it as used if so."""
        return self._database.execute("UPDATE pictures SET is_used = 1 WHERE path = ?", (path,)).rowcount > 0

    def stage(self, path: str, content: bytes) -> None:
        """Write a picture, unless it exists, so that `publish` makes it durable. Raises StorageError.

        At least every PUBLISH_SECONDS, pictures are published, so that little work is lost if the command is stopped.
        """
        if self.has(path):
            return
        if time.monotonic() - self._published_at > PUBLISH_SECONDS:
            self.publish()
        self._staged.append(path)  # first, so that a stop in the next line leaves no file
        self._store.stage(path, content)
        self._database.execute("INSERT INTO pictures VALUES (?, 1)", (path,))

    def publish(self) -> None:
        """Make staged pictures durable. Raises StorageError."""
        self._store.publish(self._staged)
        self._staged, self._published_at = [], time.monotonic()

    def sweep(self) -> int:
        """Remove the pictures that are not used, and return their number. Raises StorageError."""
        count = 0
        for paths in self._find_unused():
            self._store.remove(paths)
            count += len(paths)
        return count

    def _find_unused(self) -> Iterator[list[str]]:
        rows: Iterable[tuple[str]] = self._database.execute("SELECT path FROM pictures WHERE NOT is_used")
        paths = [path for (path,) in rows]
        for start in range(0, len(paths), REMOVED_TOGETHER):
            yield paths[start : start + REMOVED_TOGETHER]
