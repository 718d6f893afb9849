"""Test that a full temporary folder ends a command with exit code 75 and advice, and makes no table invalid."""

from __future__ import annotations

import errno
import gzip
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from batch_infer.errors import StorageError
from batch_infer.store import temporary
from batch_infer.store.temporary import create_temporary, open_temporary_text, temporary_file_errors, temporary_folder
from tests.runs import CommandResult, command

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def small_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a temporary folder in which no file can exceed 100 kB."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    class Small(temporary._Raw):
        def write(self, data: object, /) -> int:
            with temporary_file_errors():
                if self.tell() + len(memoryview(data)) > 100_000:  # type: ignore[arg-type]
                    raise FULL
            return super().write(data)

    monkeypatch.setattr(temporary, "_Raw", Small)
    yield folder
    assert not list(folder.iterdir())


def assert_reported(done: CommandResult, folder: Path, out: Path) -> None:
    assert done.code == 75, done.stderr
    assert f"cannot write a temporary file in {folder}: No space left on device; free some space there" in done.stderr
    assert "set TMPDIR" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "results.parquet").exists()


def run(table: str | Path, out: Path) -> CommandResult:
    return command("run", table, "-o", out, "--num-processes", "0", "--device", "cpu", "--limit", "1")


def test_standard_input_that_does_not_fit_ends_the_run(
    small_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(b"prompt\n" + b"a red circle\n" * 20_000), closed=False)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(**vars(stdin), isatty=lambda: False))
    assert_reported(run("-", out), small_folder, out)


def test_a_compressed_table_that_does_not_fit_is_not_invalid(small_folder: Path, out: Path, tmp_path: Path) -> None:
    prompts = [bytes(text).hex() for text in np.random.default_rng(0).integers(0, 256, (200, 500), np.uint8)]
    stream = io.BytesIO()
    pq.write_table(pa.table({"prompt": prompts}), stream)
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt\na red circle\n")
    (folder / "b.parquet.gz").write_bytes(gzip.compress(stream.getvalue()))
    assert_reported(run(folder, out), small_folder, out)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_downloaded_table_that_does_not_fit_is_not_invalid(
    out: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "get_file", full)
    files = MemoryFileSystem()
    files.pipe_file("/temporary/a.csv", b"prompt\na red circle\n")
    try:
        assert_reported(run("memory://temporary/a.csv", out), Path(tempfile.gettempdir()), out)
    finally:
        files.rm("/temporary", recursive=True)


def test_invalid_rows_that_do_not_fit_end_a_plan(
    small_folder: Path, out: Path, tmp_path: Path, probe_here: None
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("prompt,height\n" + "a red circle,7\n" * 2_000)
    assert_reported(command("plan", table, "-o", out, "--device", "cpu"), small_folder, out)


def test_a_missing_temporary_folder_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    for create in (temporary_folder, open_temporary_text, lambda: create_temporary(tmp_path / "missing" / "x")):
        with pytest.raises(StorageError, match=f"in {tmp_path / 'missing'}: No such file or directory; .* set TMPDIR"):
            create()


def test_read_errors_are_raised_unchanged() -> None:
    with pytest.raises(FileNotFoundError), temporary_file_errors(reads=True):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")


def test_text_round_trips() -> None:
    with open_temporary_text() as file:
        file.write("ä\nb\r\n" * 100_000)
        file.seek(0)
        assert file.read() == "ä\nb\r\n" * 100_000
