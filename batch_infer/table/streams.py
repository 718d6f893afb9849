"""The bytes and lines of a file, unpacked as they are read."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import pyarrow as pa

from batch_infer.errors import RowError, StorageError, TableError, first_line
from batch_infer.store import create_temporary
from batch_infer.table.endings import TableFile

LONGEST = 16 << 20
"""Characters of one row, or bytes of one of Parquet: what an open quote may take in before it is given up."""

BUFFER = 1 << 16
ZSTD_READ = 1 << 12
"""Arrow loses what it had unpacked in the read that meets the break: so little at a time."""

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
UTF_8_MARK = b"\xef\xbb\xbf"
MAGIC = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
MAGIC_BYTES = 10
PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}

_NAMES = ("ENOENT", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "ELOOP", "ENAMETOOLONG", "ENXIO", "EINVAL")
_OF_THE_FILE = {getattr(errno, name) for name in _NAMES}
"""The errnos that mean the path is not a readable file. Other errors are of the disk or the network."""


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda packed: gzip.GzipFile(fileobj=packed, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda packed: pa.CompressedInputStream(packed, "zstd"),
}


def refuse_storage_fault(error: Exception, name: str, *, was_opened: bool = False) -> None:
    """Raise StorageError for an error of the system, such as EIO, which says nothing about the content of the file.

    With `was_opened`, also for errors on a file that was opened before, such as one that was removed since.
    """
    if not isinstance(error, OSError) or error.errno in (None, errno.EINVAL):
        return
    if was_opened or error.errno not in _OF_THE_FILE:
        raise StorageError(f"cannot read {name}: {reason(error)}; run the same command again to continue") from error


class _File(io.FileIO):
    """A file on disk. Errors while it is read are raised as StorageError that names the table."""

    def __init__(self, file: TableFile) -> None:
        super().__init__(file.path)
        self._table = file.name

    def readinto(self, buffer: Any, /) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            refuse_storage_fault(error, self._table)
            raise


class _Unpacked(io.RawIOBase):
    """What a packed file holds. All that stands before a fault is given before the fault is raised, as OSError."""

    def __init__(self, packed: BinaryIO, packing: str) -> None:
        self._packed, self._packing = packed, packing
        self._source: Any = _OPENERS[packing](packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            found = self._read(len(view))
        except EOFError as error:
            raise OSError(f"the {PACKED[self._packing]} stream is cut off") from error
        except (zlib.error, lzma.LZMAError) as error:
            raise OSError(f"the {PACKED[self._packing]} stream is damaged: {error}") from error
        view[: len(found)] = found
        return len(found)

    def _read(self, size: int) -> bytes:
        if self._packing == ".zst":
            return cast("bytes", self._source.read(min(size, ZSTD_READ)))
        return cast("bytes", self._source.read1(size))

    def close(self) -> None:
        if not self.closed:
            self._source.close()
            self._packed.close()
        super().close()


def open_unpacked(file: TableFile) -> io.BufferedReader:
    """Return a file decompressed, as a stream of bytes. Raises OSError, and StorageError where the disk fails."""
    with ExitStack() as stack:
        stream: io.BufferedReader = stack.enter_context(io.BufferedReader(_File(file), BUFFER))
        if file.packing and (start := stream.peek(MAGIC_BYTES)):
            if not MAGIC[file.packing].match(start):
                raise OSError(f"it is not {PACKED[file.packing]}")
            stream = stack.enter_context(io.BufferedReader(_Unpacked(stream, file.packing), BUFFER))
        stack.pop_all()
        return stream


def open_bytes(file: TableFile) -> io.BufferedReader:
    """The bytes of a text file, after the byte order mark. Raises OSError, and TableError for UTF-16."""
    with ExitStack() as stack:
        stream = stack.enter_context(open_unpacked(file))
        start = stream.peek(4)
        if start.startswith(UTF_16):
            raise TableError(f"{file.name} is UTF-16; save it as UTF-8, or convert it: iconv -f UTF-16 -t UTF-8")
        if start.startswith(UTF_8_MARK):
            stream.read(len(UTF_8_MARK))
        stack.pop_all()
        return stream


def open_text(file: TableFile, newline: str | None) -> TextIO:
    """The text of a file. Bytes that are not UTF-8 come as lone surrogates, so that they cost their own row alone."""
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8", errors="surrogateescape", newline=newline)


def unpack(file: TableFile, place: Path) -> Path:
    """Write what a packed file holds to `place`, for a format that is not read from front to back.

    Raises OSError where it cannot be read, StorageError where the copy cannot be written.
    """
    with open_unpacked(file) as stream, create_temporary(place) as copy:
        shutil.copyfileobj(stream, copy, BUFFER)
    return place


class Lines:
    """The lines of a text, with their ends. `number` is that of the last line, from 1.

    A line that is too long raises RowError, unless `too_long` is overridden. The next line follows it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._readline = stream.readline
        self.longest = LONGEST
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._readline(self.longest)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) < self.longest or line[-1] in "\r\n":
            return line
        return self.too_long(self._pieces(line))

    def too_long(self, pieces: Iterator[str]) -> str:
        """Skip the pieces of a line that is too long. A subclass may return what it keeps of the line."""
        for _ in pieces:
            pass
        raise RowError(f"is longer than {self.longest} characters")

    def _pieces(self, piece: str) -> Iterator[str]:
        """Yield a line in pieces, of which this is the first."""
        while piece:
            yield piece
            piece = "" if piece[-1] in "\r\n" else self._readline(self.longest)


def reason(error: Exception) -> str:
    """What is wrong with a file, without its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
