"""Record the latest result of each image and its faults in a temporary database, since there may be millions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa

from batch_infer.manifest import IS_LATEST
from batch_infer.store import insert_rows, temporary_database

Key = tuple[str, int]
"""Id and image index of a result."""
IMAGE_COLUMNS = ("id", "image_index", "status", "attempt", "finished_at", "generated_image", "sha256", "image_bytes")
"""The columns of a part that `ImageRecords.add` reads. All exist since the first format version."""
_CREATE = (
    "CREATE TABLE images (id, image_index, status, attempt, finished_at, path, sha256, image_bytes, part)",
    "CREATE TABLE repeated (id, image_index, part)",
    "CREATE TABLE missing (id, image_index, PRIMARY KEY (id, image_index)) WITHOUT ROWID",
    "CREATE TABLE expected_paths (path PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE faults (id, image_index, kind, detail, PRIMARY KEY (id, image_index)) WITHOUT ROWID",
)
# An index that is built once, after all rows, takes a quarter of the time of one that each row updates.
_FINISH = (
    "CREATE INDEX key ON images (id, image_index, attempt, finished_at)",
    "INSERT INTO repeated SELECT id, image_index, part FROM images"
    " GROUP BY id, image_index, attempt, part HAVING count(*) > 1",
    f"DELETE FROM images AS c WHERE NOT {IS_LATEST}",
)
_HAS_SEVERAL = "SELECT 1 FROM images GROUP BY id, image_index HAVING count(*) > 1 LIMIT 1"


class ImageRecord(NamedTuple):
    """An image by its result: its path in OUT, key, SHA-256 in hexadecimal digits and size in bytes."""

    path: str
    id: str
    image_index: int
    sha256: str | None
    byte_count: int | None


class ImageRecords:
    """Latest result of each image in the manifest, and the faults of images, in a temporary database.

    Use it as a context manager. Methods raise StorageError if the temporary folder is full.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._open()

    def clear(self) -> None:
        """Remove all records."""
        self._database.close()
        self._parts.clear()
        self._open()

    def _open(self) -> None:
        self._database = temporary_database()
        for statement in _CREATE:
            self._database.execute(statement)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> ImageRecords:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, part: str, table: pa.Table) -> None:
        """Add the results in a table of a part, which has at least IMAGE_COLUMNS."""
        table = table.select(IMAGE_COLUMNS)
        times = table.schema.get_field_index("finished_at")
        table = table.set_column(times, "finished_at", table["finished_at"].cast(pa.int64()))
        columns = [column.to_pylist() for column in table.columns]
        if self._parts[-1:] != [part]:
            self._parts.append(part)
        insert_rows(self._database, "images", [*columns, [len(self._parts) - 1] * len(table)])

    def finish(self) -> None:
        """Keep only the latest result of each image, and find those that a part repeats, once all parts are added."""
        self._database.execute(_FINISH[0])
        if self._database.execute(_HAS_SEVERAL).fetchone():
            for statement in _FINISH[1:]:
                self._database.execute(statement)

    def iterate_repeated(self) -> Iterator[tuple[str, int, str]]:
        """Yield the id, image index and part of each result that is in one part twice with the same attempt."""
        rows = self._database.execute("SELECT id, image_index, part FROM repeated ORDER BY 1, 2")
        return ((name, index, self._parts[part]) for name, index, part in rows)

    def iterate_images(self) -> Iterator[ImageRecord]:
        """Yield all images, sorted by path."""
        columns = "path, id, image_index, sha256, image_bytes"
        rows = self._database.execute(f"SELECT {columns} FROM images WHERE path IS NOT NULL ORDER BY path")
        return map(ImageRecord._make, rows)

    def iterate_without_path(self) -> Iterator[Key]:
        """Yield the keys of results that are ok but have no image."""
        return iter(self._database.execute("SELECT id, image_index FROM images WHERE path IS NULL AND status = 'ok'"))

    def count(self) -> tuple[int, int]:
        """Return the number of table rows and of images."""
        rows, images = self._database.execute("SELECT count(DISTINCT id), count(path) FROM images").fetchone()
        return rows, images

    def count_statuses(self) -> dict[str, int]:
        """Return the number of results by status, the most frequent first."""
        select = "SELECT status, count(*) AS number FROM images GROUP BY status ORDER BY number DESC, status"
        return dict(self._database.execute(select).fetchall())

    def add_missing(self, key: Key, paths: Iterable[str]) -> None:
        """Record a row without a result, and the paths that its image may have."""
        self._database.execute("INSERT OR IGNORE INTO missing VALUES (?, ?)", key)
        self._database.executemany("INSERT OR IGNORE INTO expected_paths VALUES (?)", ((path,) for path in paths))

    def is_missing(self, key: Key) -> bool:
        return bool(self._database.execute("SELECT 1 FROM missing WHERE id = ? AND image_index = ?", key).fetchone())

    def is_expected(self, path: str) -> bool:
        """Return whether a path is one that the image of a row without a result may have."""
        try:
            return bool(self._database.execute("SELECT 1 FROM expected_paths WHERE path = ?", (path,)).fetchone())
        except UnicodeEncodeError:  # a file name that is not UTF-8
            return False

    def add_fault(self, key: Key, kind: str, detail: str) -> None:
        """Record an image that must be rendered again."""
        self._database.execute("INSERT OR IGNORE INTO faults VALUES (?, ?, ?, ?)", (*key, kind, detail))

    def get_fault(self, key: Key) -> str | None:
        """Return the kind of the first fault of an image, or None."""
        row = self._database.execute("SELECT kind FROM faults WHERE id = ? AND image_index = ?", key).fetchone()
        return row[0] if row else None

    def iterate_faults(self) -> Iterator[tuple[str, int, str, str]]:
        """Yield the id, image index, kind of fault and detail of each image that must be rendered again."""
        last: tuple[object, ...] = ("", -1)
        select = (
            "SELECT id, image_index, kind, detail FROM faults WHERE (id, image_index) > (?, ?) ORDER BY 1, 2 LIMIT 256"
        )
        while page := self._database.execute(select, last).fetchall():
            yield from page
            last = page[-1][:2]
