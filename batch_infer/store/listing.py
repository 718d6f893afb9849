"""List and hash the images of a local OUT, of which there may be millions."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter

from batch_infer.errors import StorageError
from batch_infer.store.files import CHUNK_BYTES
from batch_infer.store.protocol import NOT_A_FILE, FileDigest

READING_THREADS = 8
MIN_THREADED_BYTES = 64 << 10
"""Mean size in bytes from which images are hashed on several threads.

Threads overlap reading and hashing, which hold no lock of the interpreter. For smaller images, they mostly wait for
that lock. On two cores, two threads took 1.6 times as long as one for images of 16 kB, and 0.6 times for 64 kB.
"""
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_READ_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))


def list_tree(root: str, folder: str, *, needs_sizes: bool) -> Iterator[tuple[str, int | None]]:
    """Yield the path relative to `root`, and the size, of each file at any depth in a folder, sorted by path.

    The size is NOT_A_FILE for anything else, such as a link, which is not followed, and None for a file if sizes are
    not needed: asking for them takes as long as all the rest. A missing folder is empty. Raises StorageError. Memory is
    proportional to the largest folder.
    """
    entries: list[tuple[str, int | None]] = []
    try:
        with os.scandir(f"{root}/{folder}") as scan:
            for entry in scan:
                if entry.is_dir(follow_symlinks=False):
                    entries.append((f"{entry.name}/", None))
                elif not entry.is_file(follow_symlinks=False):
                    entries.append((entry.name, NOT_A_FILE))
                elif not needs_sizes:
                    entries.append((entry.name, None))
                elif (size := _read_size(entry)) is not None:
                    entries.append((entry.name, size))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.islink(f"{root}/{folder}"):  # noqa: PTH114
            return
        raise StorageError(f"cannot read {root}/{folder}: {error.strerror}") from error
    entries.sort(key=itemgetter(0))  # with the slash, a folder's files sort as their paths do
    for name, size in entries:
        if name.endswith("/"):
            yield from list_tree(root, f"{folder}/{name[:-1]}", needs_sizes=needs_sizes)
        else:
            yield f"{folder}/{name}", size


def _read_size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # removed since it was listed
        return None


def hash_files(root: str, files: Sequence[tuple[str, int]]) -> list[FileDigest | None]:
    """Return the digests of files with these paths and expected sizes, reading at most one byte more than expected.

    The digest is None for a file that has disappeared or whose bytes the disk has lost. Raises StorageError.
    """
    if sum(size for _, size in files) < MIN_THREADED_BYTES * len(files):
        return [_hash_file(f"{root}/{name}", size) for name, size in files]
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return list(pool.map(lambda file: _hash_file(f"{root}/{file[0]}", file[1]), files))


def _hash_file(path: str, size: int) -> FileDigest | None:
    try:
        descriptor = os.open(path, _READ_FLAGS)
        try:
            content = os.read(descriptor, min(size + 1, CHUNK_BYTES))
            digest, length = hashlib.sha256(content), len(content)
            # A small file has ended, so only a large one is read again.
            while CHUNK_BYTES <= length <= size and (chunk := os.read(descriptor, min(size + 1 - length, CHUNK_BYTES))):
                digest.update(chunk)
                length += len(chunk)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _MISSING or error.errno == errno.EIO:
            return None
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    return FileDigest(digest.hexdigest(), length)
