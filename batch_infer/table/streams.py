"""Read the bytes or lines of a file, and decompress them while reading."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import pyarrow as pa

from batch_infer.errors import RowError, TableError
from batch_infer.store import create_temporary
from batch_infer.table.base import TableFile, raise_storage_error

MAX_ROW_SIZE = 16 << 20
"""Maximum number of characters in a row (in a JSON document, up to twice as many), or of bytes in a Parquet row.

A longer quoted cell counts as unclosed.
"""
BUFFER = 1 << 16
ZSTD_READ = 1 << 12
"""Bytes per zstd read. It is small because Arrow loses the data of a read that fails."""
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF_8_MARK = b"\xef\xbb\xbf"
MAGIC_BYTES = 10


class _Compression(NamedTuple):
    name: str
    magic: re.Pattern[bytes]
    open: Callable[[BinaryIO], Any]


COMPRESSIONS = {
    ".gz": _Compression("gzip", re.compile(rb"\x1f\x8b"), lambda raw: gzip.GzipFile(fileobj=raw, mode="rb")),
    ".bz2": _Compression("bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    ".xz": _Compression("xz", re.compile(rb"\xfd7zXZ\x00"), lzma.LZMAFile),
    ".zst": _Compression(
        "zstd",
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        lambda raw: pa.CompressedInputStream(raw, "zstd"),
    ),
}


class _RawFile(io.FileIO):
    """Reads a file on disk. Raises a StorageError that names the table if the disk fails."""

    def __init__(self, file: TableFile) -> None:
        super().__init__(file.path)
        self._table = file.name

    def readinto(self, buffer: Any, /) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise_storage_error(error, self._table)
            raise


class _Decompressed(io.RawIOBase):
    """Reads the content of a compressed file. Returns most data before any damage, and then raises OSError."""

    def __init__(self, raw: BinaryIO, suffix: str) -> None:
        self._raw, self._name = raw, COMPRESSIONS[suffix].name
        self._source = COMPRESSIONS[suffix].open(raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            data = self._source.read1(min(len(view), ZSTD_READ) if self._name == "zstd" else len(view))
        except EOFError as error:
            raise OSError(f"the {self._name} stream is cut off") from error
        except (zlib.error, lzma.LZMAError) as error:
            raise OSError(f"the {self._name} stream is damaged: {error}") from error
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
            self._raw.close()
        super().close()


def open_decompressed(file: TableFile) -> io.BufferedReader:
    """Open a file for reading its decompressed bytes. Raises OSError, and StorageError if the disk fails."""
    with ExitStack() as stack:
        stream: io.BufferedReader = stack.enter_context(io.BufferedReader(_RawFile(file), BUFFER))
        if file.compression and (start := stream.peek(MAGIC_BYTES)):
            compression = COMPRESSIONS[file.compression]
            if not compression.magic.match(start):
                raise OSError(f"it is not {compression.name}")
            stream = stack.enter_context(io.BufferedReader(_Decompressed(stream, file.compression), BUFFER))
        stack.pop_all()
        return stream


def open_bytes(file: TableFile) -> io.BufferedReader:
    """Open a text file for reading its bytes, without a byte order mark at the start.

    Raises OSError, StorageError if the disk fails, and TableError for UTF-16.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(open_decompressed(file))
        start = stream.peek(4)
        if start.startswith(UTF_16_MARKS):
            raise TableError(f"{file.name} is UTF-16; save it as UTF-8, or convert it: iconv -f UTF-16 -t UTF-8")
        if start.startswith(UTF_8_MARK):
            stream.read(len(UTF_8_MARK))
        stack.pop_all()
        return stream


def open_text(file: TableFile, newline: str | None) -> TextIO:
    """Open a text file. Bytes that are not UTF-8 become lone surrogates. Raises the errors of `open_bytes`."""
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8", errors="surrogateescape", newline=newline)


def decompress(file: TableFile, path: Path) -> Path:
    """Write the decompressed file to `path` and return `path`. Raises OSError, StorageError."""
    with open_decompressed(file) as stream, create_temporary(path) as copy:
        shutil.copyfileobj(stream, copy, BUFFER)
    return path


class LineReader:
    """Reads lines with their line endings. `number` is the number of the last line read, from 1.

    A line that is too long raises RowError unless `shorten` is overridden. Reading can continue with the next line.
    """

    def __init__(self, stream: TextIO) -> None:
        self._readline = stream.readline
        self.max_length = MAX_ROW_SIZE
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._readline(self.max_length)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) < self.max_length or line[-1] in "\r\n":
            return line
        return self.shorten(self._read_pieces(line))

    def shorten(self, pieces: Iterator[str]) -> str:
        """Skip a line that is too long and raise RowError. A subclass may return a shorter line instead."""
        for _ in pieces:
            pass
        raise RowError(f"is longer than {self.max_length} characters")

    def _read_pieces(self, piece: str) -> Iterator[str]:
        """Yield a line in pieces, starting with `piece`."""
        while piece:
            yield piece
            piece = "" if piece[-1] in "\r\n" else self._readline(self.max_length)


def read_lines(stream: TextIO) -> Iterator[tuple[int, str, str | None]]:
    """Yield the number and text of each nonblank line, and an error message if it is too long, else None."""
    lines = LineReader(stream)
    while True:
        try:
            text, error = next(lines), None
        except StopIteration:
            return
        except RowError as exc:
            text, error = "", f"line {lines.number} {exc}"
        if error or not text.isspace():
            yield lines.number, text, error
