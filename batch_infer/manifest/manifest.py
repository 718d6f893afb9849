"""Commit, list and index the parts in OUT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from time import monotonic

import pyarrow as pa

from batch_infer.errors import DamagedPartError
from batch_infer.manifest.columns import to_table
from batch_infer.manifest.index import ManifestIndex
from batch_infer.manifest.parts import part_name, read_carried_fields, run_number, write_part
from batch_infer.records import ResultRow, digest
from batch_infer.store import PinnedFolder, host_id, list_names, make_folder


class Manifest:
    """Manifest parts in OUT/manifest."""

    def __init__(self, out: Path | PinnedFolder, run: int = 0) -> None:
        """`run` is the number of the committing run, from 1 in each OUT, or 0 if the writer is not a run."""
        self._out, self._run = PinnedFolder.pin(out), run
        self._has_folder = False
        self.folder = self._out.path / "manifest"

    def commit(self, rows: Sequence[ResultRow], carried: pa.Schema) -> str:
        """Write rows as one part and return its file name, with a digest of the rows. Raises StorageError.

        The rows are durable when this returns. An earlier crash loses all of them together.
        """
        name = part_name(self._run, digest([[row.id, row.image_index, row.fingerprint, row.attempt] for row in rows]))
        table = to_table(rows, carried)
        self._out.check()
        if not self._has_folder:
            make_folder(self.folder)
            self._has_folder = True
        write_part(self.folder / name, table, host_id(), monotonic())
        return name

    def parts(self, since_run: int = 0) -> list[Path]:
        """Return the parts of runs with at least this number, or none if there is no folder.

        Raises StorageError if the folder cannot be listed.
        """
        parts = (self.folder / name for name in list_names(self.folder) if fnmatchcase(name, "part-*.parquet"))
        return [part for part in parts if run_number(part) >= since_run]

    def schemas(self) -> Iterator[pa.Schema]:
        """Yield the carried columns of every part. Raises DamagedPartError, NewerPartError, StorageError."""
        return (pa.schema(read_carried_fields(part)) for part in self.parts())

    def index(self, since_run: int = 0, on_damage: Callable[[DamagedPartError], object] | None = None) -> ManifestIndex:
        """Index the parts of runs with at least this number.

        `on_damage` is called for each damaged part, which is then skipped. Raises NewerPartError, StorageError, and
        DamagedPartError without `on_damage`.
        """
        return ManifestIndex(self.parts(since_run), on_damage)
