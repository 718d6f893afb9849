"""Commit, list and index the manifest parts in OUT."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from fnmatch import fnmatchcase
from time import monotonic

import pyarrow as pa

from batch_infer.errors import BatchInferError, DamagedPartError, StorageError
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
        self._large_parts: set[str] = set()

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
        known = self._large_parts
        parts = (part for part in self.parts() if part.name not in excluded and part.name not in known)
        return compact_parts(parts, first_active_run, known)

    def schemas(self) -> Iterator[pa.Schema]:
        """Yield the carried columns of every part. Raises DamagedPartError, NewerPartError, StorageError."""
        return (pa.schema(read_carried_fields(part)) for part in prefetch(self.parts()))

    def index(self, since_run: int = 0, on_damage: Callable[[DamagedPartError], object] | None = None) -> ManifestIndex:
        """Index the parts from run number `since_run` on.

        With `on_damage`, damaged parts are skipped and their errors are passed to it. Without it, raises
        DamagedPartError. Raises NewerPartError, and StorageError, for example if the folder lists parts that do not
        exist.
        """
        index = ManifestIndex()
        try:
            tried, missing_names = set[str](), set[str]()
            previous: set[str] | None = None
            while True:
                parts = self.parts(since_run)
                names = {part.name for part in parts}
                missing_names |= index.add([part for part in parts if part.name not in tried], on_damage)
                tried |= names
                # If another command combines parts meanwhile, a listing may have neither a new part nor those that it
                # replaces, because folders are not listed atomically. The next listing then has the new part.
                if previous is not None and previous <= names:
                    break
                previous = names
            if not missing_names.isdisjoint(names):
                # A network file system lists the folder as it was, so parts with these rows are not known yet.
                raise StorageError(
                    f"{self.store.locate(FOLDER)} lists parts that do not exist: run the same command again"
                )
        except BatchInferError:
            index.close()
            raise
        return index
