"""The folder of parts under OUT: commit, list and index them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from time import monotonic

import pyarrow as pa

from batch_infer.errors import DamagedPart
from batch_infer.manifest.columns import to_table
from batch_infer.manifest.index import ManifestIndex
from batch_infer.manifest.parts import part_name, read_carried_fields, run_number, write_part
from batch_infer.records import ResultRow, digest
from batch_infer.store import PinnedFolder, host_id, list_names, make_folder


class Manifest:
    """The parts under OUT/manifest."""

    def __init__(self, out: Path | PinnedFolder, run: int = 0) -> None:
        """`run`: the number of the run that commits, from 1 in each OUT; 0 for a writer that is not a run."""
        self._out, self._run = PinnedFolder.of(out), run
        self._has_folder = False
        self.folder = self._out.path / "manifest"

    def commit(self, rows: Sequence[ResultRow], carried: pa.Schema) -> str:
        """Write rows as one part and return its file name, a digest of the rows. Raises StorageError.

        When this returns, the rows are durable; a crash before that loses all of them together.
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
        """Return the parts of runs with this number or a higher one, none where there is no folder.

        Raises StorageError where the folder cannot be listed.
        """
        parts = (self.folder / name for name in list_names(self.folder) if fnmatchcase(name, "part-*.parquet"))
        return [part for part in parts if run_number(part) >= since_run]

    def schemas(self) -> Iterator[pa.Schema]:
        """Yield the carried columns of every part. Raises DamagedPart, NewerPart, StorageError."""
        return (pa.schema(read_carried_fields(part)) for part in self.parts())

    def index(self, since_run: int = 0, damaged: Callable[[DamagedPart], object] | None = None) -> ManifestIndex:
        """Return an index of what is committed, or was by runs since that number.

        `damaged` is called with each damaged part, which is then left out. Raises DamagedPart without it, NewerPart,
        StorageError.
        """
        return ManifestIndex(self.parts(since_run), damaged)
