"""predictions.csv: the rows that mini-batches return, in the order in which they do."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TextIO

from batch_infer.simulation.messages import Returned
from batch_infer.store import write_errors


class Predictions:
    """The file, begun anew. Raises StorageError.

    `kept` False: rows are not kept, and one from before is taken away.
    """

    def __init__(self, path: Path, *, kept: bool) -> None:
        self._path, self._kept = path, kept
        self._file: TextIO | None = None
        self._stack = ExitStack()

    @property
    def path(self) -> Path | None:
        return self._path if self._kept else None

    def append(self, returned: Returned) -> None:
        if self._file is not None:
            with write_errors(self._path):
                if returned.head and not self._file.tell():
                    self._file.write(returned.head)
                self._file.write(returned.text)
                self._file.flush()

    def __enter__(self) -> Predictions:
        with write_errors(self._path):
            if self._kept:  # a character that has no UTF-8 is no reason to lose the others
                file = self._path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
                self._file = self._stack.enter_context(file)
            else:
                self._path.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
