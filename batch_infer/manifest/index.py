"""Every committed image by its key: which of the parts has it, and what is known of it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa

from batch_infer.errors import BatchInferError, DamagedPart, StorageError
from batch_infer.manifest.parts import SCHEMA, cast_table, read_part
from batch_infer.store import path_exists, temporary_database


@dataclass(frozen=True, slots=True)
class CommittedImage:
    """What the manifest holds of one image."""

    status: str
    fingerprint: str
    attempt: int
    path: str | None
    part: str
    row: int
    source_file: str
    failures: int
    """How often this very row, by its fingerprint, has failed."""


Damaged = Callable[[DamagedPart], object]
"""Who is told of a damaged part, in the place of an exception that ends all."""

CACHED_BYTES = 64 << 20
"""Of parts that are kept in memory: rows of neighbouring parts stand in turns in the tables."""
_INDEXED = ("id", "image_index", "status", "fingerprint", "attempt", "generated_image", "source_file", "source_row")
_FOUND = (
    "SELECT status, fingerprint, attempt, path, part, row, source_file, (SELECT count(*) FROM failures AS f"
    " WHERE f.id = c.id AND f.image_index = c.image_index AND f.fingerprint = c.fingerprint) FROM committed AS c"
)


class _Tables:
    """The parts that were read last, bounded by their size in memory."""

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[Path, tuple[str, ...] | None], pa.Table] = OrderedDict()
        self._size = 0

    def read(self, part: Path, columns: tuple[str, ...] | None) -> pa.Table:
        """Read columns of a part, all for None. Raises DamagedPart, StorageError."""
        key = part, columns
        if key not in self._tables:
            self._tables[key] = read_part(part, columns)
            self._size += self._tables[key].nbytes
            while self._size > CACHED_BYTES and len(self._tables) > 1:
                self._size -= self._tables.popitem(last=False)[1].nbytes
        self._tables.move_to_end(key)
        return self._tables[key]


class ManifestIndex:
    """Every committed image by its key, kept in a temporary file so that memory does not grow with the manifest."""

    def __init__(self, parts: Iterable[Path], damaged: Damaged | None = None) -> None:
        self._database = temporary_database()
        self._database.execute(
            "CREATE TABLE committed (id TEXT, image_index INTEGER, status TEXT, fingerprint TEXT, attempt INTEGER,"
            " path TEXT, source_file TEXT, source_row INTEGER, time INTEGER, part TEXT, row INTEGER,"
            " PRIMARY KEY (id, image_index)) WITHOUT ROWID"
        )
        self._database.execute("CREATE INDEX capitals ON committed (lower(id)) WHERE id != lower(id)")
        self._database.execute("CREATE TABLE failures (id TEXT, image_index INTEGER, fingerprint TEXT)")
        self._database.execute("CREATE INDEX failed ON failures (id, image_index, fingerprint)")
        self.image_folders: set[str] = set()
        """Folders of all images that any part names, relative to OUT."""
        self._parts = {part.name: part for part in parts}
        self._tables = _Tables()
        try:
            self._add_all(self._parts.values(), damaged)
        except BatchInferError:
            self.close()
            raise

    def add(self, parts: Iterable[Path], damaged: Damaged | None = None) -> None:
        """Take in those of these parts that are not in yet. Raises DamagedPart, StorageError.

        Where it raises, those that were read are in, and the others are asked for again. A part that has gone since
        it was listed counts for nothing: somebody has set it aside.
        """
        for part in parts:
            if part.name in self._parts:
                continue
            try:
                self._add(part)
            except DamagedPart as error:
                if damaged is None:
                    raise
                damaged(error)
            except StorageError:
                if path_exists(part):
                    raise
            else:
                self._parts[part.name] = part

    def _add_all(self, parts: Iterable[Path], damaged: Damaged | None) -> None:
        for part in list(parts):
            try:
                self._add(part)
            except DamagedPart as error:
                if damaged is None:
                    raise
                damaged(error)
                del self._parts[part.name]

    def _add(self, part: Path) -> None:
        table = read_part(part, (*_INDEXED, "finished_at"))
        table = table.append_column("row", pa.array(range(len(table)), pa.int64()))
        table = table.append_column("time", table["finished_at"].cast(pa.int64()))
        columns = table.to_pydict()
        rows = list(zip(*(columns[name] for name in (*_INDEXED, "time", "row")), strict=True))
        self.image_folders.update(path.rpartition("/")[0] for path in columns["generated_image"] if path)
        failed = [(name, k, fingerprint) for name, k, status, fingerprint, *_ in rows if status == "failed"]
        self._database.executemany("INSERT INTO failures VALUES (?,?,?)", failed)
        # Ties are two workers' word on the same attempt, as where one has died before it could tell that it was done:
        # the later one's image is the one that is there.
        self._database.executemany(
            "INSERT INTO committed VALUES (?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (id, image_index) DO UPDATE SET"
            " status = excluded.status, fingerprint = excluded.fingerprint, attempt = excluded.attempt,"
            " path = excluded.path, source_file = excluded.source_file, source_row = excluded.source_row,"
            " time = excluded.time, part = excluded.part, row = excluded.row"
            " WHERE excluded.attempt > attempt OR (excluded.attempt = attempt AND excluded.time >= time)",
            ((*row[:-1], part.name, row[-1]) for row in rows),
        )

    def find(self, key: tuple[str, int]) -> CommittedImage | None:
        """The image of this (id, image_index) whose attempt is the highest."""
        if not self._parts:  # a first run asks for every row
            return None
        found = self._database.execute(f"{_FOUND} WHERE id = ? AND image_index = ?", key).fetchone()
        return CommittedImage(*found) if found else None

    def get_by_paths(self, paths: Iterable[str]) -> dict[str, CommittedImage]:
        """Return the images that are stored at these paths, by path. Reads the whole index."""
        self._database.execute("CREATE TEMPORARY TABLE IF NOT EXISTS paths (name TEXT PRIMARY KEY)")
        self._database.execute("DELETE FROM paths")
        self._database.executemany("INSERT OR IGNORE INTO paths VALUES (?)", ((path,) for path in paths))
        found = self._database.execute(f"{_FOUND} WHERE path IN (SELECT name FROM paths)")
        return {row[3]: CommittedImage(*row) for row in found}

    def similar_ids(self, name: str) -> list[tuple[str, str]]:
        """Return the other ids that equal this one when case is ignored, each with the path of an image of it."""
        if not self._parts:
            return []
        similar = self._database.execute(
            "SELECT id, path FROM committed WHERE id = lower(?1) AND id != ?1 AND path IS NOT NULL"
            " UNION ALL SELECT id, path FROM committed"
            " WHERE lower(id) = lower(?1) AND id != lower(id) AND id != ?1 AND path IS NOT NULL",
            (name,),
        )
        return similar.fetchall()

    def in_order(self, tables: Sequence[str]) -> Iterator[CommittedImage]:
        """Everything in the order of its rows in these tables; what other tables gave follows, by their names."""
        self._database.execute("CREATE TEMPORARY TABLE IF NOT EXISTS tables (name TEXT PRIMARY KEY, place INTEGER)")
        self._database.execute("DELETE FROM tables")
        self._database.executemany("INSERT OR IGNORE INTO tables VALUES (?, ?)", ((t, i) for i, t in enumerate(tables)))
        order = "ORDER BY place IS NULL, place, source_file, source_row, id, image_index"
        found = self._database.execute(f"{_FOUND} LEFT JOIN tables ON name = source_file {order}")
        return (CommittedImage(*row) for row in found)

    def count_rows(self) -> tuple[int, int]:
        """How many rows of tables there are, and of how many an image failed or the row was invalid."""
        bad = "SELECT max(status IN ('failed', 'invalid')) AS bad FROM committed GROUP BY id"
        rows, bad_rows = self._database.execute(f"SELECT count(*), coalesce(sum(bad), 0) FROM ({bad})").fetchone()
        return rows, bad_rows

    def count_statuses(self) -> Counter[str]:
        """How many images have which status."""
        return Counter(dict(self._database.execute("SELECT status, count(*) FROM committed GROUP BY status")))

    def take(self, found: Sequence[CommittedImage], schema: pa.Schema = SCHEMA) -> pa.Table:
        """These columns of these committed images, in their order; null where a part has no such column.

        Raises DamagedPart, StorageError.
        """
        by_part: dict[str, list[int]] = {}
        for committed in found:
            by_part.setdefault(committed.part, []).append(committed.row)
        # Carried columns can be large, and not every part has them.
        names = tuple(schema.names) if set(schema.names) <= set(SCHEMA.names) else None
        pieces = [
            cast_table(self._tables.read(self._parts[part], names).take(rows), schema) for part, rows in by_part.items()
        ]
        starts = dict(zip(by_part, accumulate((len(piece) for piece in pieces), initial=0), strict=False))
        order = []
        for committed in found:
            order.append(starts[committed.part])
            starts[committed.part] += 1
        return pa.concat_tables([schema.empty_table(), *pieces]).take(pa.array(order, pa.int64()))

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> ManifestIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
