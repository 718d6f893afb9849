"""The parts under OUT, written and listed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from time import monotonic

import pyarrow as pa

from batch_infer.manifest.index import Damaged, ManifestIndex
from batch_infer.manifest.parts import carried_fields, opened_part, part_name, run_number, to_table, write_part
from batch_infer.records import ResultRow, digest
from batch_infer.store import PinnedFolder, host_id, list_names, make_folder


class Manifest:
    """The parts under OUT/manifest."""

    def __init__(self, out: Path | PinnedFolder, run: int = 0) -> None:
        """`run`: the number of the run that commits, which counts from 1 in each OUT; 0 for what is not a run."""
        self._out, self._run = PinnedFolder.of(out), run
        self._made = False
        self.folder = self._out.path / "manifest"

    def commit(self, rows: Sequence[ResultRow], carried: pa.Schema) -> str:
        """Write rows as one part and return its name, which says what it holds. Raises StorageError.

        When this returns, a power cut takes none of it any more; before, it takes all of it.
        """
        name = part_name(self._run, digest([[row.id, row.image_index, row.fingerprint, row.attempt] for row in rows]))
        table = to_table(rows, carried)
        self._out.check()
        if not self._made:
            make_folder(self.folder)
            self._made = True
        write_part(self.folder / name, table, host_id(), monotonic())
        return name

    def parts(self, since_run: int = 0) -> list[Path]:
        """Return the parts that runs of this number or a higher one have committed, none where there is no folder.

        Raises StorageError where the folder cannot be listed.
        """
        parts = (self.folder / name for name in list_names(self.folder) if fnmatchcase(name, "part-*.parquet"))
        return [part for part in parts if run_number(part) >= since_run]

    def schemas(self) -> Iterator[pa.Schema]:
        """Yield the carried columns of every part. Raises DamagedPart, NewerPart, StorageError."""
        for part in self.parts():
            with opened_part(part) as file:
                yield pa.schema(list(carried_fields(part, file.schema_arrow)))

    def index(self, since_run: int = 0, damaged: Damaged | None = None) -> ManifestIndex:
        """Return what is committed, or was by runs since that number, by key.

        `damaged` is called with each damaged part, which then counts for nothing. Raises DamagedPart without it,
        NewerPart, StorageError.
        """
        return ManifestIndex(self.parts(since_run), damaged)
