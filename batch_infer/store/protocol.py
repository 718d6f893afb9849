"""Define the interface of stores: where OUT is, and how its files are read, written and locked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TextIO

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Everything that another process needs to open the same store. Can be sent to it.

    `location` is an absolute path or a URL. `identity` is the device and inode of a local folder, or None. `marker` is
    the name of a file by which a local folder is recognised, or the token of a lease, or None without a lock.
    """

    location: str
    identity: tuple[int, int] | None = None
    marker: str | None = None


IMAGE_FOLDERS = ("images", "quarantine")
"""The folders of images in OUT. In a local OUT, they may be links or mounts, for example to use a larger disk."""


def is_inside(name: str) -> bool:
    """Return whether a name, which may come from an edited manifest, cannot lead out of OUT."""
    return "\0" not in name and not {"", ".", ".."}.intersection(name.split("/"))


class PrivateFile(NamedTuple):
    """The content of a file, and when it was written, in seconds by the clock of `Store.now`.

    `is_trusted` is whether its owner and mode prove that this user wrote it.
    """

    content: bytes
    written_at: float
    is_trusted: bool


NOT_A_FILE = -1
"""Size of what is not a file, but a link or a device, for example."""


class FileDigest(NamedTuple):
    """The SHA-256 of a file in hexadecimal digits, and its size in bytes."""

    sha256: str
    size: int


class Store(Protocol):
    """A place for OUT.

    Names are POSIX paths relative to OUT, such as `manifest/part-00001-9f2c.parquet`. Folders are created as needed.
    Every file appears whole or not at all, and is durable when the method that writes it returns. Methods may be called
    from several threads. All methods may raise StorageError, for example if the storage cannot be reached, and
    SettingsError if a new try would fail too.
    """

    @property
    def location(self) -> str:
        """OUT as messages and run.json show it: an absolute path, or a URL without secrets."""
        ...

    @property
    def address(self) -> StoreAddress:
        """The address by which other processes open this store, with the same lock."""
        ...

    def locate(self, name: str) -> str:
        """Return the location of a file, for messages."""
        ...

    def check(self) -> None:
        """Check that OUT is still the same place, and that no other command has taken over the lock, if this has one.

        Callers call this before they write, because a local store checks by itself only in `stage`. An object store
        also checks before each request that changes OUT. Raises StorageError.
        """
        ...

    # Files

    def exists(self, name: str) -> bool:
        """Return whether a file, folder or link exists."""
        ...

    def list_folder(self, folder: str) -> list[str]:
        """Return the sorted names of the files and folders in a folder, without its own, or [] if it is missing."""
        ...

    def find(self, folders: Iterable[str], is_match: Callable[[str], bool]) -> Iterator[str]:
        """Yield the files at any depth in these folders whose last component `is_match` accepts.

        `""` is OUT itself, of which only the files directly in it count. Missing folders are skipped, and links inside
        the folders are not followed.
        """
        ...

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None if it is missing."""
        ...

    def prefetch(self, names: Iterable[str]) -> Iterator[str]:
        """Yield names in their order, each before the caller opens it, and download the next files in the meantime.

        Errors are raised when a file is opened. Stores without latency only yield the names.
        """
        ...

    def open_file(self, name: str) -> AbstractContextManager[pa.NativeFile]:
        """Open a file for random access. A store may cache it, so it must be one that never changes.

        A shard may only lose images that no result names. An older copy of it serves as well.

        Raises OSError if the file is missing or cannot be read.
        """
        ...

    def write(self, name: str) -> AbstractContextManager[Path]:
        """Yield the path of a temporary local file to write to, and store it unless an exception is raised.

        An OSError in the context becomes StorageError.
        """
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Store a file unless it exists, and return whether it did not. Of several processes, one succeeds."""
        ...

    def rename(self, name: str, new_name: str) -> None:
        """Rename a file, replacing any other."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Remove files. Missing files are ignored, and so are images in a linked folder inside an image folder."""
        ...

    def remove_folder(self, name: str, stop: Callable[[], bool]) -> None:
        """Remove a folder with its content, or a file, or nothing if it is missing. A link is not followed.

        Raises StoppedError soon after `stop` returns True, with some files left.
        """
        ...

    def check_kinds(self, folders: Sequence[str], files: Sequence[str]) -> None:
        """Raise SettingsError if one of `folders` is a file or a link in OUT, or one of `files` is a folder.

        Those of `folders` that are in IMAGE_FOLDERS may be links.
        """
        ...

    def contains(self, table: str, names: Iterable[str]) -> bool:
        """Return whether the path or URL of a table leads into one of these folders and files of OUT."""
        ...

    def is_link(self, name: str) -> bool:
        """Return whether a file or folder is a link."""
        ...

    def remove_empty_folder(self, name: str) -> None:
        """Remove a folder if it is empty and not a link, if this storage keeps empty folders."""
        ...

    # Images

    def is_case_sensitive(self, folder: str) -> bool:
        """Return whether names in a folder of OUT, which may be missing, may differ only by case."""
        ...

    def has_image(self, name: str) -> bool:
        """Return whether an image exists and is a file, not a link or a file in a linked folder."""
        ...

    def list_images(self, folder: str) -> set[str]:
        """Return the names of the images in a folder for which `has_image` is true, without the folder's own."""
        ...

    def read_image(self, name: str, length: int | None = None) -> bytes | None:
        """Return an image's bytes, or None if `has_image` is false or its size differs from `length`, if given."""
        ...

    def list_image_files(self, *, needs_sizes: bool = True) -> Iterator[tuple[str, int | None]]:
        """Yield the path and size in bytes of all that is in the image folders, at any depth, sorted by path.

        The size is NOT_A_FILE for anything else, such as a link. Links inside the image folders are not followed. The
        size is None if it takes time to find out and is not needed.
        """
        ...

    def hash_images(self, images: Sequence[tuple[str, int]]) -> list[FileDigest | None]:
        """Return the digests of images that `list_image_files` yielded. `images` are paths and expected sizes.

        An image that is larger than expected may be read only up to the first byte too many. The digest is None if an
        image has disappeared since, or if the storage has lost its bytes.
        """
        ...

    def stage(self, name: str, content: bytes) -> None:
        """Write an image so that it can be published. Until then, the image at `name` stays as it is."""
        ...

    def publish(self, names: Sequence[str]) -> None:
        """Make staged images durable under their names, replacing others."""
        ...

    def read_staged(self, name: str) -> bytes:
        """Return the bytes of a staged image."""
        ...

    def discard_staged(self, names: Iterable[str]) -> None:
        """Remove staged images, which will not be published."""
        ...

    def back_up(self, backups: Mapping[str, str]) -> None:
        """Keep images that `publish` will replace under other names. `backups` maps each image to its backup.

        Missing images, and those that already have a backup, are skipped. An image may be missing until `publish`.
        """
        ...

    # The lock

    def locked(self) -> AbstractContextManager[Store]:
        """Create OUT if it is missing, lock it, and yield the store to write with.

        Raises LockedError with the holder, SettingsError, StorageError.
        """
        ...

    def find_holder(self) -> str | None:
        """Return a description of the process that holds the lock, or None. Raises StorageError if that is unknown."""
        ...

    # Other files

    def open_log(self, name: str) -> AbstractContextManager[TextIO]:
        """Open a log file, and append the traceback of any exception but SystemExit that leaves the context."""
        ...

    def now(self) -> float:
        """Return the time in seconds by the storage's clock, by which it dates files."""
        ...

    @property
    def keeps_file_owners(self) -> bool:
        """Whether the storage may keep the owners and modes of files. Otherwise, `write_private` returns False."""
        ...

    def write_private(self, name: str, content: bytes) -> bool:
        """Store a file that only this user may read. Return whether `read_private` can prove who wrote it."""
        ...

    def read_private(self, name: str) -> PrivateFile | None:
        """Return a file that `write_private` may have written, or None if it is missing. Links are not followed."""
        ...


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in a store. Its text is its location, for messages."""

    store: Store
    path: str

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return self.store.locate(self.path)
