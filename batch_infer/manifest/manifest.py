"""The parts under OUT, written and listed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pyarrow as pa

from batch_infer.atomic import KnownFolder, make_folder
from batch_infer.manifest.index import Damaged, Index
from batch_infer.manifest.parts import opened_part, to_table, write_part
from batch_infer.records import ResultRow, digest


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
        write_part(self.folder / name, table)
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
