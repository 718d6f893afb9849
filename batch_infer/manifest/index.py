"""Index the rows of manifest parts in a temporary database."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.errors import BatchInferError, DamagedPartError
from batch_infer.manifest.columns import SCHEMA, cast_table
from batch_infer.manifest.parts import Part, read_part
from batch_infer.store import StoredFile, insert_rows, prefetch, temporary_database, to_stored_file, unless_removed

CACHED_BYTES = 64 << 20
"""Maximum total size in bytes of cached parts, except that the last part read is kept even if it is larger.

Parts are cached because rows in table order may alternate between them.
"""
INSERT_ROWS = 1 << 15
"""Number of rows at which the rows of several parts are inserted together.

With fewer rows, converting the columns to Python costs more than inserting them.
"""
FETCH_ROWS = 1024
"""Number of rows to fetch from the database together, because each call has a cost."""
_COLUMNS = (
    *("id", "image_index", "attempt", "finished_at", "status", "fingerprint", "generated_image"),
    *("source_file", "source_row"),
)
_CREATE = (
    "CREATE TABLE images (id, image_index, attempt, finished_at, status, fingerprint, path, source, source_row, place)",
    "CREATE TEMPORARY TABLE paths (name PRIMARY KEY)",
    "CREATE TEMPORARY TABLE source_ranks (source INTEGER PRIMARY KEY, rank)",
)
# Appending all rows and sorting the keys afterwards takes about half as long as keeping them in order.
_CREATE_INDEX = "CREATE INDEX IF NOT EXISTS keys ON images (id, image_index, attempt, finished_at)"
_SELECT = (
    "SELECT c.status, c.fingerprint, c.attempt, c.path, c.place, c.source,"
    " CASE WHEN c.status = 'failed' THEN (SELECT count(DISTINCT f.attempt) FROM images AS f WHERE f.id = c.id AND"
    " f.image_index = c.image_index AND f.fingerprint = c.fingerprint AND f.status = 'failed' AND f.attempt >"
    " (SELECT coalesce(max(o.attempt), 0) FROM images AS o WHERE o.id = c.id AND o.image_index = c.image_index AND"
    " o.status != 'failed')) ELSE 0 END"
)
# Two workers commit the same attempt if the first dies before it reports the row as finished. Of equal attempts, the
# later one counts, because its image is the one on disk.
_FIND = (
    f"{_SELECT} FROM images AS c WHERE c.id = ? AND c.image_index = ?"
    " ORDER BY c.attempt DESC, c.finished_at DESC, c.rowid DESC LIMIT 1"
)
IS_LATEST = (
    "NOT EXISTS (SELECT 1 FROM images AS later WHERE later.id = c.id AND later.image_index = c.image_index AND"
    " (later.attempt, later.finished_at, later.rowid) > (c.attempt, c.finished_at, c.rowid))"
)
"""SQL condition that the row `c` of a table `images` is the latest result of its image."""


@dataclass(frozen=True, slots=True)
class CommittedImage:
    """Manifest entry for one image, which is row number `row` of the part named `part`.

    `path` is None without an image file. `failures` is the number of failed attempts with this fingerprint since the
    last attempt that did not fail.
    """

    status: str
    fingerprint: str
    attempt: int
    path: str | None
    part: str
    row: int
    source_file: str
    failures: int


class ManifestIndex:
    """Indexes committed images in a temporary file instead of in memory, because there may be millions."""

    def __init__(
        self, parts: Iterable[Part] = (), on_damage: Callable[[DamagedPartError], object] | None = None
    ) -> None:
        """Index parts. See `add`."""
        self.image_folders: set[str] = set()
        """Folders of all committed images, relative to OUT."""
        self.parts: dict[str, StoredFile] = {}
        """The indexed parts by name."""
        self._part_names: list[str] = []
        self._source_files: dict[str, int] = {}
        self._source_names: list[str] = []
        self._cache: OrderedDict[tuple[str, tuple[str, ...] | None], pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._database = temporary_database()
        try:
            for statement in _CREATE:
                self._database.execute(statement)
            self.add(parts, on_damage)
        except BatchInferError:
            self.close()
            raise

    def add(self, parts: Iterable[Part], on_damage: Callable[[DamagedPartError], object] | None = None) -> set[str]:
        """Index the parts that are not indexed yet, and return the names of those that do not exist.

        A part that another process has removed or renamed does not exist any more. Each DamagedPartError is passed to
        `on_damage`, or raised if `on_damage` is None. Raises NewerPartError, StorageError. After an error, the next
        call indexes the remaining parts.
        """
        new_parts = [part for part in map(to_stored_file, parts) if part.name not in self.parts]
        missing_names = {part.name for part in new_parts}
        if not new_parts:
            return missing_names
        tables: list[tuple[StoredFile, pa.Table]] = []
        try:
            for part in prefetch(new_parts):
                with unless_removed(part):
                    try:
                        tables.append((part, read_part(part, _COLUMNS)))
                    except DamagedPartError as error:
                        if on_damage is None:
                            raise
                        on_damage(error)
                    missing_names.remove(part.name)
                if sum(len(table) for _, table in tables) >= INSERT_ROWS:
                    self._insert(tables)
        finally:
            self._insert(tables)
        self._database.execute(_CREATE_INDEX)
        return missing_names

    def _insert(self, tables: list[tuple[StoredFile, pa.Table]]) -> None:
        """Insert the rows of parts, and empty the list."""
        if not tables:
            return
        first_part = len(self._part_names)
        places = [
            range(number << 32, (number << 32) + len(table)) for number, (_, table) in enumerate(tables, first_part)
        ]
        table = pa.concat_tables([table for _, table in tables]).combine_chunks()
        paths = table["generated_image"].drop_null()
        self.image_folders.update(pc.unique(pc.replace_substring_regex(paths, "/[^/]*$", "")).to_pylist())
        for name in pc.unique(table["source_file"]).to_pylist():
            if name not in self._source_files:
                self._source_files[name] = len(self._source_names)
                self._source_names.append(name)
        table = table.set_column(
            table.column_names.index("finished_at"), "finished_at", table["finished_at"].cast(pa.int64())
        )
        values = {name: table[name].to_pylist() for name in _COLUMNS}
        values["source_file"] = [self._source_files[name] for name in values["source_file"]]
        insert_rows(self._database, "images", [*values.values(), list(chain.from_iterable(places))])
        for part, _ in tables:
            self.parts[part.name] = part
            self._part_names.append(part.name)
        tables.clear()

    def find(self, key: tuple[str, int]) -> CommittedImage | None:
        """Return the committed image for (id, image_index) with the highest attempt, or None."""
        if not self.parts:  # saves a first run one query per row
            return None
        row = self._database.execute(_FIND, key).fetchone()
        return self._to_image(row) if row else None

    def _to_image(self, row: Sequence[Any]) -> CommittedImage:
        """Convert a row of `_SELECT`."""
        status, fingerprint, attempt, path, place, source, failures = row
        part, part_row = self._part_names[place >> 32], place & 0xFFFFFFFF
        return CommittedImage(status, fingerprint, attempt, path, part, part_row, self._source_names[source], failures)

    def has_id(self, name: str) -> bool:
        """Return whether a row with this id has a result."""
        return self._database.execute("SELECT 1 FROM images WHERE id = ? LIMIT 1", (name,)).fetchone() is not None

    def get_by_paths(self, paths: Iterable[str]) -> dict[str, CommittedImage]:
        """Return the committed images at these paths, by path. Reads the whole index."""
        self._database.execute("DELETE FROM paths")
        self._database.executemany("INSERT OR IGNORE INTO paths VALUES (?)", ((path,) for path in paths))
        condition = f"c.path IN (SELECT name FROM paths) AND {IS_LATEST}"
        rows = self._database.execute(f"{_SELECT} FROM images AS c WHERE {condition}")
        return {row[3]: self._to_image(row) for row in rows}

    def iterate_shard_members(self) -> Iterator[str]:
        """Yield the paths of all committed images in shards, sorted."""
        condition = f"c.path >= 'shards/' AND c.path < 'shards0' AND {IS_LATEST}"
        rows = self._database.execute(f"SELECT c.path FROM images AS c WHERE {condition} ORDER BY c.path")
        return (path for (path,) in rows)

    def similar_ids(self, name: str) -> list[tuple[str, str]]:
        """Return (id, path) of each image file whose id differs from this id only by the case of ASCII letters."""
        if not self.parts:
            return []
        # Only runs that render need this index.
        self._database.execute("CREATE INDEX IF NOT EXISTS lower_ids ON images (lower(id)) WHERE id != lower(id)")
        select = f"SELECT c.id, c.path FROM images AS c WHERE {IS_LATEST} AND c.id != ?1 AND c.path IS NOT NULL AND"
        similar = self._database.execute(
            f"{select} c.id = lower(?1) UNION ALL {select} lower(c.id) = lower(?1) AND c.id != lower(c.id)", (name,)
        )
        return similar.fetchall()

    def iterate_in_table_order(self, tables: Sequence[str]) -> Iterator[CommittedImage]:
        """Yield all images: first those of these tables, in this order, then those of other tables by table name.

        Within a table, they are in the order of its rows.
        """
        ranks = {name: rank for rank, name in enumerate(dict.fromkeys((*tables, *sorted(self._source_files))))}
        self._database.execute("DELETE FROM source_ranks")
        self._database.executemany(
            "INSERT INTO source_ranks VALUES (?, ?)",
            ((source, ranks[name]) for name, source in self._source_files.items()),
        )
        rows = self._database.execute(
            f"{_SELECT} FROM images AS c JOIN source_ranks USING (source) WHERE {IS_LATEST}"
            " ORDER BY rank, c.source_row, c.id, c.image_index"
        )
        for batch in iter(lambda: rows.fetchmany(FETCH_ROWS), []):
            yield from map(self._to_image, batch)

    def count_rows(self) -> tuple[int, int]:
        """Return the number of table rows, and the number of rows that are invalid or have a failed image."""
        bad = f"SELECT max(status IN ('failed', 'invalid')) AS bad FROM images AS c WHERE {IS_LATEST} GROUP BY id"
        rows, bad_rows = self._database.execute(f"SELECT count(*), coalesce(sum(bad), 0) FROM ({bad})").fetchone()
        return rows, bad_rows

    def count_statuses(self) -> Counter[str]:
        """Count images by status."""
        select = f"SELECT status, count(*) FROM images AS c WHERE {IS_LATEST} GROUP BY status"
        return Counter(dict(self._database.execute(select)))

    def read_results(self, images: Sequence[CommittedImage], schema: pa.Schema = SCHEMA) -> pa.Table:
        """Return the results of `images` in their order, cast to a schema. Columns missing from a part are null.

        Raises DamagedPartError, StorageError.
        """
        positions: dict[str, list[int]] = {}
        for position, image in enumerate(images):
            positions.setdefault(image.part, []).append(position)
        # Carried columns can be large, so skip them if the schema has none. Otherwise read all: parts may lack some.
        names = tuple(schema.names) if set(schema.names) <= set(SCHEMA.names) else None
        pieces = [schema.empty_table()]
        for part, part_positions in positions.items():
            table = self._read_part(part, names)
            pieces.append(cast_table(table.take([images[position].row for position in part_positions]), schema))
        by_part = pa.array(chain.from_iterable(positions.values()), pa.int64())
        return pa.concat_tables(pieces).take(pc.sort_indices(by_part))

    def _read_part(self, part: str, columns: tuple[str, ...] | None) -> pa.Table:
        """Read these columns of a part, or all if `columns` is None, and cache recent tables up to CACHED_BYTES."""
        key = part, columns
        if key not in self._cache:
            self._cache[key] = read_part(self.parts[part], columns)
            self._cached_bytes += self._cache[key].nbytes
            while self._cached_bytes > CACHED_BYTES and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        self._cache.move_to_end(key)
        return self._cache[key]

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> ManifestIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
