"""Read images from shards: files of OUT that contain the images of many rows, in a format that data loaders read."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import pyarrow as pa

from batch_infer.errors import StorageError
from batch_infer.store import NOT_A_FILE, Store

SHARD_FOLDER = "shards"
OPEN_SHARDS = 8
"""Number of shards that stay open, because images in table order may alternate between shards."""
_PATH = re.compile(r"(?P<shard>shards/[0-9a-f]+-(?P<count>[0-9]{1,9})(?P<suffix>\.[a-z]+))#(?P<image>[^/#\0]+)")
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_DAMAGE = (OSError, ValueError, LookupError, TypeError, pa.ArrowException)
"""Exceptions that reading a damaged or edited shard raises. An OSError with an errno is not about the content."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CommitLimits:
    """Maximum number of rows to commit together, and the number of seconds after which fewer rows are committed."""

    rows: int
    seconds: float


class DamagedShardError(ValueError):
    """A shard cannot be read, or not completely."""


class Sample(NamedTuple):
    """An image for a shard: its file name there, its bytes, and the number of its row in a table."""

    name: str
    content: bytes
    row: int


class Shard(Protocol):
    """An open shard. Methods raise ValueError, LookupError or OSError if it is damaged."""

    sizes: Mapping[str, int]
    """Size in bytes of each image by its name, as far as the shard can be read."""

    def read(self, name: str) -> bytes:
        """Return the bytes of one of these images, or fewer if the shard is truncated."""
        ...

    def keep(self, names: Collection[str], path: Path) -> None:
        """Write these images, with the columns of their rows, to a new shard."""
        ...


class ShardFormat(Protocol):
    """A file format of shards. `suffix` is that of its files."""

    suffix: str

    def write(self, path: Path, samples: Iterable[Sample], rows: pa.Table) -> None:
        """Write samples, with the columns of their rows, to a new file."""
        ...

    def load(self, file: pa.NativeFile) -> Shard:
        """Read the list of images in a shard. Raises ValueError, LookupError or OSError if it is damaged."""
        ...


@dataclass(frozen=True, slots=True)
class Member:
    """An image in a shard. Its path is `SHARD#IMAGE`. `count` is the number of images when the shard was written."""

    shard: str
    image: str
    suffix: str
    count: int


def parse_member(path: str) -> Member | None:
    """Return the member that a path names, which anyone may have edited, or None if the path names none."""
    match = _PATH.fullmatch(path)
    return match and Member(match["shard"], match["image"], match["suffix"], int(match["count"]))


class ShardReader:
    """Reads the shards of OUT. Methods raise StorageError, and may be called from several threads."""

    def __init__(self, store: Store, formats: Sequence[ShardFormat]) -> None:
        self._store, self._formats = store, {shard_format.suffix: shard_format for shard_format in formats}
        self._open: OrderedDict[str, tuple[ExitStack, Shard]] = OrderedDict()
        self._lock = threading.RLock()

    def list_shards(self) -> list[str]:
        """Return the sorted paths of the shards. A linked folder counts as empty, because it is not part of OUT."""
        if self._store.is_link(SHARD_FOLDER):
            return []
        paths = (f"{SHARD_FOLDER}/{name}" for name in self._store.list_folder(SHARD_FOLDER))
        return [path for path in paths if parse_member(f"{path}#_")]

    def list_members(self) -> Iterator[tuple[str, int]]:
        """Yield the path and size in bytes of each image in the shards, and of all that is no shard, sorted by path."""
        shards, others = set(self.list_shards()), set[str]()
        if not self._store.is_link(SHARD_FOLDER):
            others = {f"{SHARD_FOLDER}/{name}" for name in self._store.list_folder(SHARD_FOLDER)} - shards
        for shard in sorted(shards | others):  # without prefetching, since shards are large
            if shard in others:
                yield shard, NOT_A_FILE
                continue
            sizes = self.get_sizes(shard)
            yield from ((f"{shard}#{name}", sizes[name]) for name in sorted(sizes))

    def get_sizes(self, shard: str) -> Mapping[str, int]:
        """Return the size of each image in a shard by its name, as far as the shard exists and can be read."""
        with self._lock:
            opened = self._get(shard)
            return {} if opened is None else opened.sizes

    def read(self, member: Member, length: int | None = None) -> bytes | None:
        """Return the bytes of an image, or fewer if its shard is truncated.

        Return None if it is missing or unreadable, or if its size differs from `length`, if given.
        """
        with self._lock:
            opened = self._get(member.shard)
            if opened is None or opened.sizes.get(member.image) is None:
                return None
            if length not in (None, opened.sizes[member.image]):
                return None
            try:
                return self._read(member.shard, lambda: opened.read(member.image))
            except DamagedShardError:
                return None

    def keep(self, shard: str, images: Collection[str]) -> bool:
        """Remove all images but these from a shard, atomically.

        Return False without a change if the shard does not have all these images or one of them cannot be read.
        """
        with self._lock:
            opened = self._get(shard)
            if opened is None or not opened.sizes.keys() >= set(images):
                return False
            if len(opened.sizes) == len(images):
                return True
            try:
                with self._store.write(shard) as path:
                    self._copy(opened, shard, images, path)
                    self.close()  # because Windows cannot replace an open file
            except DamagedShardError:
                return False
            return True

    def _copy(self, opened: Shard, shard: str, images: Collection[str], path: Path) -> None:
        """Write these images of a shard to a new file. Raises DamagedShardError, and OSError if the disk is full."""
        try:
            opened.keep(images, path)
            with pa.memory_map(str(path)) as file:
                sizes = self._get_format(shard).load(file).sizes
        except _DAMAGE as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise DamagedShardError(str(error)) from error
        if sizes != {name: opened.sizes[name] for name in images}:
            raise DamagedShardError(f"{shard} is truncated")

    def close(self) -> None:
        """Close all shards, which are opened again when they are needed."""
        with self._lock:
            while self._open:
                self._open.popitem()[1][0].close()

    def _get(self, shard: str) -> Shard | None:
        """Open a shard, and close the one that was used least recently if too many are open.

        Return None if it is missing or damaged.
        """
        if shard not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1][0].close()
            with ExitStack() as stack:
                try:
                    opened = self._read(shard, lambda: self._open_shard(shard, stack))
                except DamagedShardError:
                    return None
                self._open[shard] = stack.pop_all(), opened
        self._open.move_to_end(shard)
        return self._open[shard][1]

    def _open_shard(self, shard: str, stack: ExitStack) -> Shard:
        if self._store.is_link(SHARD_FOLDER) or self._store.is_link(shard):
            raise DamagedShardError(f"{shard} is a link")
        return self._get_format(shard).load(stack.enter_context(self._store.open_file(shard)))

    def _get_format(self, shard: str) -> ShardFormat:
        member = parse_member(f"{shard}#_")
        if member is None or member.suffix not in self._formats:
            raise DamagedShardError(f"{shard} is not a shard")
        return self._formats[member.suffix]

    def _read(self, shard: str, action: Callable[[], T]) -> T:
        """Return the result of an action that reads a shard. Raises StorageError, DamagedShardError."""
        try:
            return action()
        except _DAMAGE as error:
            number = getattr(error, "errno", None)
            if number is None or number in _MISSING:
                raise DamagedShardError(str(error)) from error
            raise StorageError(f"cannot read {self._store.locate(shard)}: {os.strerror(number)}") from error
