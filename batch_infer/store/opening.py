"""Open the store at a path or URL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias
from weakref import WeakValueDictionary

from batch_infer.errors import SettingsError, StorageError
from batch_infer.store.folder import USAGE_ERRORS
from batch_infer.store.local import LocalStore
from batch_infer.store.protocol import Store, StoreAddress, StoredFile

Out: TypeAlias = "Path | str | StoreAddress | Store"
"""A place for OUT: a path, a URL, the address of a store, or a store."""
_open_stores: WeakValueDictionary[StoreAddress, Store] = WeakValueDictionary()
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(location: str) -> bool:
    """Return whether OUT is at a URL, and not in a local folder."""
    return _URL.match(location) is not None


def open_store(out: Out) -> Store:
    """Open the store for OUT, which may not exist yet, or return it if it is one.

    Raises SettingsError if the URL is not supported or a path is not UTF-8, and StorageError if a local folder cannot
    be read.
    """
    if isinstance(out, (str, Path)):
        refuse_unprintable(str(out))
        out = _open_url(StoreAddress(str(out))) if is_url(str(out)) else _open_folder(Path(out))
    if not isinstance(out, StoreAddress):
        return out
    return _open_locked_url(out) if is_url(out.location) else LocalStore(out)


def _open_folder(path: Path) -> LocalStore:
    try:
        return LocalStore(path)
    except StorageError as error:
        if isinstance(cause := error.__cause__, OSError) and cause.errno in USAGE_ERRORS:
            raise SettingsError(f"cannot open {path}: {cause.strerror or cause}") from error
        raise


def _open_url(address: StoreAddress) -> Store:
    from batch_infer.store.objects import ObjectStore  # imports fsspec

    return ObjectStore(address)


def _open_locked_url(address: StoreAddress) -> Store:
    """Open the store of a run, or return the one that this process is using.

    A store has threads and connections, and a temporary folder, which is removed with it.
    """
    store = _open_stores.get(address)
    if store is None:
        store = _open_stores[address] = _open_url(address)
    return store


def to_absolute(out: Out) -> Out:
    """Make the path of a local OUT absolute."""
    return str(Path(out).absolute()) if isinstance(out, (str, Path)) and not is_url(str(out)) else out


def refuse_unprintable(out: str) -> None:
    """Raise SettingsError if a path contains NUL, or is not UTF-8, which Parquet libraries do not accept."""
    if "\0" in out:
        raise SettingsError("the path of OUT contains a NUL character; give another --out")
    try:
        out.encode()
    except UnicodeEncodeError as error:
        raise SettingsError(f"the path of OUT is not UTF-8: {os.fsencode(out)!r}; give another --out") from error


def to_stored_file(file: StoredFile | Path) -> StoredFile:
    """Return a file of a store for a path on this machine, or the file itself."""
    return StoredFile(LocalStore(file.parent), file.name) if isinstance(file, Path) else file


def prefetch(files: Iterable[StoredFile]) -> Iterator[StoredFile]:
    """Yield files of one store in their order, while those that follow are read ahead. Such files never change."""
    files = list(files)
    if files:
        for file, _ in zip(files, files[0].store.prefetch(file.path for file in files), strict=True):
            yield file


@contextmanager
def unless_removed(file: StoredFile) -> Iterator[None]:
    """Suppress StorageError if another process has removed or renamed a file."""
    try:
        yield
    except StorageError:
        if file.store.exists(file.path):
            raise
