"""Copy the results of a gallery to a temporary file, because the columns must be known before the first is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa

from batch_infer.galleries.columns import Column, choose_names
from batch_infer.store import create_temporary, temporary_file_errors, temporary_folder

CHUNK_ROWS = 1000
"""Number of results in a data file of the page."""


class Snapshot:
    """Results in order. Add all tables, then read them in chunks of CHUNK_ROWS. `columns` describes all values."""

    def __init__(self, schema: pa.Schema) -> None:
        """Create the temporary file. Raises StorageError."""
        self.columns = list(map(Column, schema, choose_names(schema.names)))
        self.rows = 0
        self.statuses: Counter[str] = Counter()
        self._schema = schema
        self._waiting: list[pa.Table] = []
        self._stack = ExitStack()
        self._path = Path(self._stack.enter_context(temporary_folder())) / "results.arrow"
        self._writers = ExitStack()
        file = self._writers.enter_context(create_temporary(self._path))
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer = self._writers.enter_context(pa.ipc.new_file(file, schema, options=options))

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self._writers.close()
        self._stack.close()

    def add(self, table: pa.Table) -> None:
        """Add results. Raises StorageError."""
        self.rows += len(table)
        self.statuses.update(table["status"].to_pylist())
        for column in self.columns:
            column.observe(table[column.source])
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= CHUNK_ROWS:
            self._write(is_last=False)

    def chunks(self) -> Iterator[pa.Table]:
        """Yield all results in tables of CHUNK_ROWS, the last of which may be smaller. Raises StorageError."""
        self._write(is_last=True)
        with temporary_file_errors():
            self._writers.close()
            file = self._stack.enter_context(pa.memory_map(str(self._path)))
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])

    def _write(self, *, is_last: bool) -> None:
        """Write the waiting rows as complete chunks, and with `is_last` also the rest."""
        table = pa.concat_tables([self._schema.empty_table(), *self._waiting])
        end = len(table) if is_last else len(table) // CHUNK_ROWS * CHUNK_ROWS
        with temporary_file_errors():
            for start in range(0, end, CHUNK_ROWS):
                chunk = table.slice(start, min(CHUNK_ROWS, end - start)).combine_chunks()
                self._writer.write_table(chunk)
        self._waiting = [table.slice(end)]
