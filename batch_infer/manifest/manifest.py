"""Commit, list and index the manifest parts in OUT."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, count
from time import monotonic

import pyarrow as pa
import pyarrow.compute as pc

from batch_infer.errors import BatchInferError, DamagedPartError
from batch_infer.manifest.columns import SCHEMA, cast_table, to_table
from batch_infer.manifest.parts import Part, read_carried_fields, read_part, run_number, write_part
from batch_infer.records import ResultRow, digest
from batch_infer.store import (
    Out,
    StoredFile,
    host_id,
    open_store,
    prefetch,
    temporary_database,
    to_stored_file,
    unless_removed,
)

FOLDER = "manifest"
CACHED_BYTES = 64 << 20
"""Maximum total size in bytes of cached parts, except that the last part read is kept even if it is larger.

Parts are cached because rows in table order may alternate between them.
"""
_VALUES = ("status", "fingerprint", "attempt", "generated_image", "source_file", "source_row", "finished_at")
_COLUMNS = ("id", "image_index", *_VALUES)
_SELECT = (
    "SELECT status, fingerprint, attempt, generated_image, part, row, source_file,"
    " (SELECT count(*) FROM failures AS f"
    " WHERE f.id = c.id AND f.image_index = c.image_index AND f.fingerprint = c.fingerprint) FROM committed AS c"
)
_CREATE = (
    f"CREATE TABLE committed ({', '.join(_COLUMNS)}, part, row, PRIMARY KEY (id, image_index)) WITHOUT ROWID",
    "CREATE INDEX upper_case ON committed (lower(id)) WHERE id != lower(id)",
    "CREATE TABLE failures (id, image_index, fingerprint)",
    "CREATE INDEX failure_key ON failures (id, image_index, fingerprint)",
    "CREATE TEMPORARY TABLE paths (name PRIMARY KEY)",
    "CREATE TEMPORARY TABLE tables (name PRIMARY KEY, position)",
)
# Two workers commit the same attempt if the first dies before it reports the row as finished. Of equal attempts, the
# later one counts, because its image is the one on disk.
_UPSERT = (
    f"INSERT INTO committed VALUES ({', '.join('?' * (len(_COLUMNS) + 2))})"
    + " ON CONFLICT (id, image_index) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in (*_VALUES, "part", "row"))
    + " WHERE excluded.attempt > attempt OR (excluded.attempt = attempt AND excluded.finished_at >= finished_at)"
)


@dataclass(frozen=True, slots=True)
class CommittedImage:
    """Manifest entry for one image, which is row number `row` of the part named `part`.

    `path` is None without an image file. `failures` is the number of failed attempts with this fingerprint.
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

    def __init__(self, parts: Iterable[Part], on_damage: Callable[[DamagedPartError], object] | None = None) -> None:
        """Index parts. Each DamagedPartError is passed to `on_damage`, or raised if `on_damage` is None.

        Raises NewerPartError, StorageError.
        """
        self.image_folders: set[str] = set()
        """Folders of all committed images, relative to OUT."""
        self.parts: dict[str, StoredFile] = {}
        """The indexed parts by name."""
        self._cache: OrderedDict[tuple[str, tuple[str, ...] | None], pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._database = temporary_database()
        try:
            for statement in _CREATE:
                self._database.execute(statement)
            for part in prefetch(map(to_stored_file, parts)):
                self._add(part, on_damage)
        except BatchInferError:
            self.close()
            raise

    def add(self, parts: Iterable[Part], on_damage: Callable[[DamagedPartError], object] | None = None) -> None:
        """Index the parts that are not indexed yet. Without `on_damage`, raises DamagedPartError.

        Raises NewerPartError, StorageError. After an error, the next call indexes the remaining parts. A part that
        another process has removed or renamed is skipped.
        """
        new_parts = (part for part in map(to_stored_file, parts) if part.name not in self.parts)
        for part in prefetch(new_parts):
            with unless_removed(part):
                self._add(part, on_damage)

    def _add(self, part: StoredFile, on_damage: Callable[[DamagedPartError], object] | None) -> None:
        try:
            table = read_part(part, _COLUMNS)
        except DamagedPartError as error:
            if on_damage is None:
                raise
            on_damage(error)
            return
        times = table["finished_at"].cast(pa.int64())
        columns = [*(table[name].to_pylist() for name in _COLUMNS[:-1]), times.to_pylist()]
        rows = [(*row, part.name, row_number) for row_number, row in enumerate(zip(*columns, strict=True))]
        self.image_folders.update(path.rpartition("/")[0] for path in table["generated_image"].to_pylist() if path)
        failures = [(name, index, fingerprint) for name, index, status, fingerprint, *_ in rows if status == "failed"]
        self._database.executemany("INSERT INTO failures VALUES (?, ?, ?)", failures)
        self._database.executemany(_UPSERT, rows)
        self.parts[part.name] = part

    def find(self, key: tuple[str, int]) -> CommittedImage | None:
        """Return the committed image for (id, image_index) with the highest attempt, or None."""
        if not self.parts:  # saves a first run one query per row
            return None
        row = self._database.execute(f"{_SELECT} WHERE id = ? AND image_index = ?", key).fetchone()
        return CommittedImage(*row) if row else None

    def get_by_paths(self, paths: Iterable[str]) -> dict[str, CommittedImage]:
        """Return the committed images at these paths, by path. Reads the whole index."""
        self._database.execute("DELETE FROM paths")
        self._database.executemany("INSERT OR IGNORE INTO paths VALUES (?)", ((path,) for path in paths))
        rows = self._database.execute(f"{_SELECT} WHERE generated_image IN (SELECT name FROM paths)")
        return {row[3]: CommittedImage(*row) for row in rows}

    def similar_ids(self, name: str) -> list[tuple[str, str]]:
        """Return (id, path) of each image file whose id differs from this id only by the case of ASCII letters."""
        if not self.parts:
            return []
        select = "SELECT id, generated_image FROM committed WHERE id != ?1 AND generated_image IS NOT NULL AND"
        similar = self._database.execute(
            f"{select} id = lower(?1) UNION ALL {select} lower(id) = lower(?1) AND id != lower(id)", (name,)
        )
        return similar.fetchall()

    def iterate_in_table_order(self, tables: Sequence[str]) -> Iterator[CommittedImage]:
        """Yield all images: first those of these tables, in this order, then those of other tables by table name.

        Within a table, they are in the order of its rows.
        """
        self._database.execute("DELETE FROM tables")
        self._database.executemany("INSERT OR IGNORE INTO tables VALUES (?, ?)", zip(tables, count()))
        order = "ORDER BY position IS NULL, position, source_file, source_row, id, image_index"
        rows = self._database.execute(f"{_SELECT} LEFT JOIN tables ON name = source_file {order}")
        return (CommittedImage(*row) for row in rows)

    def count_rows(self) -> tuple[int, int]:
        """Return the number of table rows, and the number of rows that are invalid or have a failed image."""
        bad = "SELECT max(status IN ('failed', 'invalid')) AS bad FROM committed GROUP BY id"
        rows, bad_rows = self._database.execute(f"SELECT count(*), coalesce(sum(bad), 0) FROM ({bad})").fetchone()
        return rows, bad_rows

    def count_statuses(self) -> Counter[str]:
        """Count images by status."""
        return Counter(dict(self._database.execute("SELECT status, count(*) FROM committed GROUP BY status")))

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


class Manifest:
    """Manifest parts in OUT/manifest."""

    def __init__(self, out: Out, run: int = 0) -> None:
        """`run` is the number of the run that commits parts, from 1 in each OUT, or 0 if the writer is not a run."""
        self.store, self._run = open_store(out), run

    def commit(self, rows: Sequence[ResultRow], carried: pa.Schema) -> str:
        """Write rows as one part, and return its file name. Raises StorageError.

        The name contains a digest of the rows' ids, image indices, fingerprints and attempts. The rows are durable when
        this returns. A crash before that keeps all of them or none.
        """
        content = digest([[row.id, row.image_index, row.fingerprint, row.attempt] for row in rows])
        name = f"part-{self._run:05d}-{content}.parquet" if self._run else f"part-{content}.parquet"
        table = to_table(rows, carried)
        self.store.check()
        write_part(StoredFile(self.store, f"{FOLDER}/{name}"), table, host_id(), monotonic())
        return name

    def parts(self, since_run: int = 0) -> list[StoredFile]:
        """Return the parts from run number `since_run` on. Raises StorageError if the folder cannot be listed."""
        names = (name for name in self.store.list_folder(FOLDER) if fnmatchcase(name, "part-*.parquet"))
        parts = (StoredFile(self.store, f"{FOLDER}/{name}") for name in names)
        return [part for part in parts if run_number(part) >= since_run]

    def schemas(self) -> Iterator[pa.Schema]:
        """Yield the carried columns of every part. Raises DamagedPartError, NewerPartError, StorageError."""
        return (pa.schema(read_carried_fields(part)) for part in prefetch(self.parts()))

    def index(self, since_run: int = 0, on_damage: Callable[[DamagedPartError], object] | None = None) -> ManifestIndex:
        """Index the parts from run number `since_run` on.

        With `on_damage`, damaged parts are skipped and their errors are passed to it. Without it, raises
        DamagedPartError. Raises NewerPartError, StorageError.
        """
        return ManifestIndex(self.parts(since_run), on_damage)
