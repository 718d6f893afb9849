"""Commit, list and index the manifest parts in OUT."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from fnmatch import fnmatchcase
from time import monotonic

import pyarrow as pa

from batch_infer.errors import BatchInferError, DamagedPartError
from batch_infer.manifest.columns import to_table
from batch_infer.manifest.compaction import compact_parts
from batch_infer.manifest.index import ManifestIndex
from batch_infer.manifest.parts import make_part_name, read_carried_fields, run_number, write_part
from batch_infer.records import ResultRow
from batch_infer.store import Out, StoredFile, host_id, open_store, prefetch

FOLDER = "manifest"


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
        name = make_part_name(self._run, ((row.id, row.image_index, row.fingerprint, row.attempt) for row in rows))
        table = to_table(rows, carried)
        self.store.check()
        write_part(StoredFile(self.store, f"{FOLDER}/{name}"), table, host_id(), monotonic())
        return name

    def parts(self, since_run: int = 0) -> list[StoredFile]:
        """Return the parts from run number `since_run` on. Raises StorageError if the folder cannot be listed."""
        names = (name for name in self.store.list_folder(FOLDER) if fnmatchcase(name, "part-*.parquet"))
        parts = (StoredFile(self.store, f"{FOLDER}/{name}") for name in names)
        return [part for part in parts if run_number(part) >= since_run]

    def compact(self, first_active_run: int, excluded: Container[str] = ()) -> int:
        """Combine small parts, and return the decrease in the number of parts. See `compact_parts`.

        Parts with `excluded` names stay as they are. The caller holds the lock. Raises StorageError.
        """
        return compact_parts((part for part in self.parts() if part.name not in excluded), first_active_run)

    def schemas(self) -> Iterator[pa.Schema]:
        """Yield the carried columns of every part. Raises DamagedPartError, NewerPartError, StorageError."""
        return (pa.schema(read_carried_fields(part)) for part in prefetch(self.parts()))

    def index(self, since_run: int = 0, on_damage: Callable[[DamagedPartError], object] | None = None) -> ManifestIndex:
        """Index the parts from run number `since_run` on.

        With `on_damage`, damaged parts are skipped and their errors are passed to it. Without it, raises
        DamagedPartError. Raises NewerPartError, StorageError.
        """
        index, tried = ManifestIndex(), set[str]()
        try:
            while new_parts := [part for part in self.parts(since_run) if part.name not in tried]:
                tried.update(part.name for part in new_parts)
                if index.add(new_parts, on_damage):
                    break
                # A run has compacted parts in the meantime, so list the parts again to find their rows.
        except BatchInferError:
            index.close()
            raise
        return index
