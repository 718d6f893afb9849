"""Combine small manifest parts into larger ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import pyarrow as pa

from batch_infer.errors import DamagedPartError, NewerPartError
from batch_infer.manifest.parts import Footer, make_part_name, read_footer, read_part, run_number, write_part
from batch_infer.store import StoredFile, prefetch

COMPACTED_ROWS = 1 << 14
"""Maximum number of rows in a part that combines others.

Ten million rows are then 600 parts. Larger parts would make `ManifestIndex.read_results` slower, because it keeps few
of them in memory.
"""
COMPACTED_BYTES = 64 << 20
"""Size in bytes of its rows in memory at which a part that combines others ends early."""
_SmallPart: TypeAlias = tuple[StoredFile, Footer]


def compact_parts(parts: Iterable[StoredFile], first_active_run: int, large_parts: set[str]) -> int:
    """Combine small parts, and return the decrease in the number of parts.

    The caller holds the lock of OUT. Only parts of runs are combined: workers of an endpoint take no lock. From run
    number `first_active_run` on, parts of different runs stay separate, because `status` and recovery distinguish them.
    Earlier runs are combined under the lowest of their numbers. Parts with different carried columns or commit clocks
    and parts that are damaged or in another format version stay as they are.

    Add the names of parts with too many rows to `large_parts`. A part is removed after its rows are durable in another
    part. After a kill in between, some rows exist twice, which the index ignores, and the next call removes the copies.
    Raises StorageError.
    """
    removed_count = 0
    for number, clock, small_parts in _group(parts, first_active_run, large_parts):
        for batch in _split(small_parts):
            removed_count += _combine(batch, number, clock)
    return removed_count


def _group(
    parts: Iterable[StoredFile], first_active_run: int, large_parts: set[str]
) -> Iterator[tuple[int, str, list[_SmallPart]]]:
    """Yield small parts that may be combined, in the order of their commits, with a run number and their clock."""
    groups: dict[tuple[int, str, pa.Schema], list[_SmallPart]] = defaultdict(list)
    for part in prefetch(parts):
        number = run_number(part)
        if not number:
            continue
        try:
            footer = read_footer(part)
        except (DamagedPartError, NewerPartError):  # the command that reads its rows reports it
            continue
        if footer is not None and footer.rows > COMPACTED_ROWS // 2:
            large_parts.add(part.name)
        elif footer is not None:
            key = number if number >= first_active_run else 0, footer.clock, footer.schema
            groups[key].append((part, footer))
    for (number, clock, _), small_parts in groups.items():
        small_parts.sort(key=lambda small: (small[1].seconds, small[0].name))
        yield number or min(run_number(part) for part, _ in small_parts), clock, small_parts


def _split(small_parts: Sequence[_SmallPart]) -> Iterator[list[_SmallPart]]:
    """Yield lists of adjacent parts with at most COMPACTED_ROWS rows together."""
    batch: list[_SmallPart] = []
    rows = 0
    for small in small_parts:
        rows += small[1].rows
        if rows > COMPACTED_ROWS:
            yield batch
            batch, rows = [], small[1].rows
        batch.append(small)
    yield batch


def _combine(batch: Sequence[_SmallPart], number: int, clock: str) -> int:
    """Combine parts into one, or into several if their rows are large. Return the decrease in their number."""
    removed_count, byte_count, tables, sources = 0, 0, list[pa.Table](), list[_SmallPart]()
    for small in batch:
        try:
            tables.append(read_part(small[0]))
        except DamagedPartError:
            continue
        sources.append(small)
        byte_count += tables[-1].nbytes
        if byte_count >= COMPACTED_BYTES:
            removed_count += _replace(sources, tables, number, clock)
            byte_count, tables, sources = 0, [], []
    return removed_count + _replace(sources, tables, number, clock)


def _replace(sources: Sequence[_SmallPart], tables: Sequence[pa.Table], number: int, clock: str) -> int:
    """Write the rows of `tables` as one part, then remove the parts that contained them."""
    if len(sources) < 2:
        return 0
    table = _drop_copies(pa.concat_tables(tables))
    keys = zip(*(table[name].to_pylist() for name in ("id", "image_index", "fingerprint", "attempt")), strict=True)
    first, _ = sources[0]
    combined = StoredFile(first.store, f"{first.path.rpartition('/')[0]}/{make_part_name(number, keys)}")
    if all(part.path != combined.path for part, _ in sources):  # otherwise it exists, and the others are copies
        first.store.check()
        write_part(combined, table, clock, max(footer.seconds for _, footer in sources))
    first.store.remove(part.path for part, _ in sources if part.path != combined.path)
    return len(sources) - 1


def _drop_copies(table: pa.Table) -> pa.Table:
    """Keep one row per attempt of an image: the one that finished last.

    A kill during a compaction leaves copies, and two workers commit the same attempt if one of them is lost.
    """
    latest: dict[tuple[str, int, int], int] = {}
    names = ("id", "image_index", "attempt")
    times = table["finished_at"].cast(pa.int64()).to_pylist()
    for row, key in enumerate(zip(*(table[name].to_pylist() for name in names), strict=True)):
        if times[row] >= times[latest.setdefault(key, row)]:
            latest[key] = row
    return table if len(latest) == len(table) else table.take(sorted(latest.values()))
