"""The manifest: committed results in Parquet parts, the only truth about what is done.

A part is written after its images, and renamed into place last. Rows that were rendered again stand in a later part
with a higher attempt, and for one (id, image_index) the highest attempt counts. A part's pages bear checksums, so that
what a disk has garbled is not taken for results.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_infer.atomic import KnownFolder, make_folder, replacing
from batch_infer.errors import DamagedPart, StorageError, first_line
from batch_infer.records import ResultRow, digest

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image_index", pa.int32()),
        ("prompt", pa.string()),
        ("generated_image", pa.string()),
        ("nsfw_content_detected", pa.bool_()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("negative_prompt", pa.string()),
        ("seed", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_inference_steps", pa.int32()),
        ("guidance_scale", pa.float32()),
        ("guidance_rescale", pa.float32()),
        ("scheduler", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("prompt_truncated", pa.bool_()),
        ("safety_checker", pa.string()),
        ("safety_scores", pa.map_(pa.string(), pa.float32())),
        ("sha256", pa.string()),
        ("image_bytes", pa.int64()),
        ("slots", pa.int32()),
        ("seconds", pa.float32()),
        ("attempt", pa.int32()),
        ("worker", pa.string()),
        ("finished_at", pa.timestamp("us", "UTC")),
        ("source_file", pa.string()),
        ("source_row", pa.int64()),
        ("fingerprint", pa.string()),
    ]
)
"""The result columns, in order; a part's carried columns follow them."""

_FIELDS = [field.name for field in fields(ResultRow) if field.name != "carried"]
if SCHEMA.names != _FIELDS:  # the columns are told twice, here with their types
    raise TypeError(f"records.ResultRow and manifest.SCHEMA differ: {set(_FIELDS) ^ set(SCHEMA.names)}")


@dataclass(frozen=True, slots=True)
class Committed:
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

_INDEXED = ("id", "image_index", "status", "fingerprint", "attempt", "generated_image", "source_file", "source_row")
_FOUND = (
    "SELECT status, fingerprint, attempt, path, part, row, source_file, (SELECT count(*) FROM failures AS f"
    " WHERE f.id = c.id AND f.image_index = c.image_index AND f.fingerprint = c.fingerprint) FROM committed AS c"
)


def to_table(rows: Sequence[ResultRow], carried: pa.Schema) -> pa.Table:
    """Rows as an Arrow table of the result columns and the carried ones."""
    columns = [pa.array([_cell(row, field.name) for row in rows], field.type) for field in SCHEMA]
    columns += [pa.array([row.carried.get(field.name) for row in rows], field.type) for field in carried]
    return pa.table(columns, schema=pa.schema([*SCHEMA, *carried]))


def _cell(row: ResultRow, name: str) -> Any:
    value = getattr(row, name)
    return list(value.items()) if isinstance(value, Mapping) else value


class Manifest:
    """The parts under OUT/manifest."""

    def __init__(self, out: Path | KnownFolder) -> None:
        self._out = KnownFolder.of(out)
        self._made = False
        self.folder = self._out.path / "manifest"

    def commit(self, rows: Sequence[ResultRow], carried: pa.Schema) -> str:
        """Write rows as one part and return its name, which says what it holds. Raises StorageError.

        When this returns, a power cut takes none of it any more; before, it takes all of it.
        """
        name = f"part-{digest([[row.id, row.image_index, row.fingerprint, row.attempt] for row in rows])}.parquet"
        table = to_table(rows, carried)
        self._out.check()
        if not self._made:
            make_folder(self.folder)
            self._made = True
        schema = table.schema.with_metadata({_NAMES_SUM: _sum_of(table.schema)})
        write_parquet(self.folder / name, schema, [table])
        return name

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def schemas(self) -> Iterator[pa.Schema]:
        """The columns of every part. Raises DamagedPart, StorageError."""
        for part in self.parts():
            with opened_part(part) as file:
                yield file.schema_arrow

    def index(self, since: datetime | None = None, damaged: Damaged | None = None) -> Index:
        """What is committed, or was since, looked up by key. Raises DamagedPart, StorageError.

        Where `damaged` is given, it is told of each damaged part, which then counts for nothing.
        """
        return Index(self.parts(), since, damaged)


class Index:
    """Every committed image by its key, kept in a temporary file so that memory does not grow with the manifest."""

    def __init__(self, parts: Iterable[Path], since: datetime | None = None, damaged: Damaged | None = None) -> None:
        self._database = sqlite3.connect("")  # sqlite's own temporary file, removed by closing
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute(
            "CREATE TABLE committed (id TEXT, image_index INTEGER, status TEXT, fingerprint TEXT, attempt INTEGER,"
            " path TEXT, source_file TEXT, source_row INTEGER, time INTEGER, part TEXT, row INTEGER,"
            " PRIMARY KEY (id, image_index)) WITHOUT ROWID"
        )
        self._database.execute("CREATE TABLE failures (id TEXT, image_index INTEGER, fingerprint TEXT)")
        self._database.execute("CREATE INDEX failed ON failures (id, image_index, fingerprint)")
        self._parts = {part.name: part for part in parts}
        self.times: list[datetime] = []
        """Where `since` was asked for: when the first image was begun, and the last one finished."""
        self._read_whole = lru_cache(maxsize=64)(read_part)
        try:
            self._add_all(self._parts.values(), since, damaged)
        except (DamagedPart, StorageError):
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
                self._add(part, None)
            except DamagedPart as error:
                if damaged is None:
                    raise
                damaged(error)
            except StorageError:
                if part.exists():
                    raise
            else:
                self._parts[part.name] = part

    def _add_all(self, parts: Iterable[Path], since: datetime | None, damaged: Damaged | None) -> None:
        for part in list(parts):
            try:
                self._add(part, since)
            except DamagedPart as error:
                if damaged is None:
                    raise
                damaged(error)
                del self._parts[part.name]

    def _add(self, part: Path, since: datetime | None) -> None:
        table = read_part(part, (*_INDEXED, "finished_at", "seconds"))
        table = table.append_column("row", pa.array(range(len(table)), pa.int64()))
        if since is not None:
            table = table.filter(pc.field("finished_at") >= since)
            self._note_times(table)
        table = table.append_column("time", table["finished_at"].cast(pa.int64()))
        columns = table.to_pydict()
        rows = list(zip(*(columns[name] for name in (*_INDEXED, "time", "row")), strict=True))
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

    def _note_times(self, table: pa.Table) -> None:
        ends = table["finished_at"].to_pylist()
        begins = [
            end - timedelta(seconds=took or 0) for end, took in zip(ends, table["seconds"].to_pylist(), strict=True)
        ]
        self.times = [min(begins + self.times), max(ends + self.times)] if ends else self.times

    def find(self, key: tuple[str, int]) -> Committed | None:
        """The image of this (id, image_index) whose attempt is the highest."""
        if not self._parts:  # a first run asks for every row
            return None
        found = self._database.execute(f"{_FOUND} WHERE id = ? AND image_index = ?", key).fetchone()
        return Committed(*found) if found else None

    def in_order(self, tables: Sequence[str]) -> Iterator[Committed]:
        """Everything in the order of its rows in these tables; what other tables gave follows, by their names."""
        self._database.execute("CREATE TEMPORARY TABLE IF NOT EXISTS tables (name TEXT PRIMARY KEY, place INTEGER)")
        self._database.execute("DELETE FROM tables")
        self._database.executemany("INSERT OR IGNORE INTO tables VALUES (?, ?)", ((t, i) for i, t in enumerate(tables)))
        order = "ORDER BY place IS NULL, place, source_file, source_row, id, image_index"
        found = self._database.execute(f"{_FOUND} LEFT JOIN tables ON name = source_file {order}")
        return (Committed(*row) for row in found)

    def rows(self) -> tuple[int, int]:
        """How many rows of tables there are, and of how many an image failed or the row was invalid."""
        bad = "SELECT max(status IN ('failed', 'invalid')) AS bad FROM committed GROUP BY id"
        rows, bad_rows = self._database.execute(f"SELECT count(*), coalesce(sum(bad), 0) FROM ({bad})").fetchone()
        return rows, bad_rows

    def statuses(self) -> Counter[str]:
        """How many images have which status."""
        return Counter(dict(self._database.execute("SELECT status, count(*) FROM committed GROUP BY status")))

    def take(self, found: Sequence[Committed], schema: pa.Schema = SCHEMA) -> pa.Table:
        """These columns of these committed images, in their order; null where a part has no such column.

        Raises DamagedPart, StorageError.
        """
        by_part: dict[str, list[int]] = {}
        for committed in found:
            by_part.setdefault(committed.part, []).append(committed.row)
        # Carried columns can be large, and not every part has them.
        names = tuple(schema.names) if set(schema.names) <= set(SCHEMA.names) else None
        pieces = [_as(self._read_whole(self._parts[part], names).take(rows), schema) for part, rows in by_part.items()]
        starts = dict(zip(by_part, accumulate((len(piece) for piece in pieces), initial=0), strict=False))
        order = []
        for committed in found:
            order.append(starts[committed.part])
            starts[committed.part] += 1
        return pa.concat_tables([schema.empty_table(), *pieces]).take(pa.array(order, pa.int64()))

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A part's columns as those of a schema: of another type where other parts have it so, and null where missing."""
    columns = [
        _cast(table[field.name], field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type == kind:
        return column
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a list as text, say
        return pa.chunked_array([[None if value is None else str(value) for value in column.to_pylist()]], pa.string())


@contextmanager
def opened_part(part: Path) -> Iterator[pq.ParquetFile]:
    """A part, of which nothing is read yet but its foot. Raises DamagedPart, also for what is read while it is open.

    A disk that cannot be read, or a part that has gone meanwhile, is StorageError: it may be back in a moment.
    """
    try:
        with pa.OSFile(str(part)) as stream, pq.ParquetFile(stream, page_checksum_verification=True) as file:
            if (file.schema_arrow.metadata or {}).get(_NAMES_SUM) not in (None, _sum_of(file.schema_arrow)):
                raise DamagedPart(part, "its columns are not those that were written")
            yield file
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        number = getattr(error, "errno", None)  # what the system says has one, what Arrow says of the content has none
        if number is None:
            raise DamagedPart(part, first_line(error).rstrip(".")) from error
        raise StorageError(f"cannot read {part}: {os.strerror(number)}") from error


_NAMES_SUM = b"batch-infer-columns"
"""Where a part keeps the checksum of its columns' names, which those of its pages do not cover.

Not of their types: those of carried columns may read otherwise with another version of Arrow.
"""


def _sum_of(schema: pa.Schema) -> bytes:
    return digest(schema.names).encode()


def read_part(part: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a part, all for None. Raises DamagedPart, StorageError."""
    with opened_part(part) as file:
        for field in SCHEMA if columns is None else (SCHEMA.field(name) for name in columns):
            if field.name not in file.schema_arrow.names:
                raise DamagedPart(part, f"it has no column {field.name}")
            if (found := file.schema_arrow.field(field.name)) != field:
                raise DamagedPart(part, f"its column {field.name} is {found.type}, and not {field.type}")
        table = file.read(None if columns is None else list(columns), use_threads=False)
        table.validate(full=True)
        return table


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables as one Parquet file that appears whole or not at all. Raises StorageError."""
    with replacing(path, parents=False) as temporary, _parquet_writer(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _parquet_writer(path: Path, schema: pa.Schema) -> closing[pq.ParquetWriter]:
    return closing(pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True))
