"""Keep OUT in a local folder."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from batch_infer.errors import SettingsError, StoppedError
from batch_infer.store.files import (
    atomic_write,
    fsync,
    fsync_folder,
    is_folder,
    is_link,
    list_names,
    path_exists,
    read_errors,
    remove_tree,
    scan_folder,
    temporary_path,
    write_errors,
)
from batch_infer.store.folder import find_holder, locked_folder
from batch_infer.store.local_images import LocalImages
from batch_infer.store.logfile import open_log
from batch_infer.store.protocol import IMAGE_FOLDERS, PrivateFile

if TYPE_CHECKING:
    import pyarrow as pa

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV}
PRIVATE_BYTES = 4096
"""Maximum number of bytes to read of a private file, since other users may write to OUT."""
_PRIVATE_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class LocalStore(LocalImages):
    """Keeps OUT in a folder, and checks before each write that no other folder has replaced it. This is a Store."""

    def locate(self, name: str) -> str:
        return str(self.root / name)

    # Files

    def exists(self, name: str) -> bool:
        return path_exists(self.root / name)

    def list_folder(self, folder: str) -> list[str]:
        return list_names(self.root / folder)

    def find(self, folders: Iterable[str], is_match: Callable[[str], bool]) -> Iterator[str]:
        for name in folders:
            top = self.root / name
            if not is_folder(top, follow=name in (*IMAGE_FOLDERS, "")):
                continue
            waiting = [top]
            while waiting:
                folder = waiting.pop()
                files, subfolders = self._scan(folder, is_match)
                yield from files
                waiting += subfolders if name else []

    def find_direct(self, folders: Iterable[str], is_match: Callable[[str], bool]) -> Iterator[str]:
        """Yield as `find` does, but only the files directly in these folders. None of them may be a link."""
        for name in folders:
            if is_folder(self.root / name):
                yield from self._scan(self.root / name, is_match)[0]

    def _scan(self, folder: Path, is_match: Callable[[str], bool]) -> tuple[list[str], list[Path]]:
        """Return the names of the matching files in a folder, and its subfolders. Both are empty if it is missing."""
        with write_errors(folder):
            try:
                files, subfolders = scan_folder(folder, is_match)
            except (FileNotFoundError, NotADirectoryError):
                return [], []
        return [file.relative_to(self.root).as_posix() for file in files], subfolders

    def read(self, name: str) -> bytes | None:
        path = self.root / name
        with read_errors(path):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def prefetch(self, names: Iterable[str]) -> Iterator[str]:
        return iter(names)

    def open_file(self, name: str) -> AbstractContextManager[pa.NativeFile]:
        import pyarrow as pa  # slow, and not needed by most commands' start

        return pa.OSFile(str(self.root / name))  # type: ignore[no-any-return]

    def write(self, name: str) -> AbstractContextManager[Path]:
        target = self.root / name
        self._make_folder(target.parent)
        return atomic_write(target, parents=False)

    def create(self, name: str, content: bytes) -> bool:
        """Store a file unless it exists. On a file system without hard links, two processes may both succeed."""
        path = self.root / name
        temporary = temporary_path(path)
        with write_errors(path):
            try:
                temporary.write_bytes(content)
                fsync(temporary)
                try:
                    path.hardlink_to(temporary)
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in _NO_HARD_LINKS:
                        raise
                    if path_exists(path):
                        return False
                    temporary.replace(path)
                fsync_folder(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def rename(self, name: str, new_name: str) -> None:
        target = self.root / new_name
        with write_errors(target):
            os.replace(self.root / name, target)  # noqa: PTH105
            fsync_folder(target.parent)

    def remove(self, names: Iterable[str]) -> None:
        for target in filter(None, map(self._resolve, names)):
            with write_errors(target):
                target.unlink(missing_ok=True)

    def remove_folder(self, name: str, stop: Callable[[], bool]) -> None:
        path = self.root / name
        children = [path / child for child in list_names(path)] if is_folder(path) else []
        for target in (*filter(is_folder, children), path):
            if stop():
                raise StoppedError(f"stopped while removing {path}")
            remove_tree(target)
        with write_errors(self.root):
            fsync_folder(self.root)
        self._forget_folders()

    def check_kinds(self, folders: Sequence[str], files: Sequence[str]) -> None:
        for name in (*folders, *files):
            path = self.root / name
            with read_errors(path):
                try:
                    mode = path.stat(follow_symlinks=name in IMAGE_FOLDERS).st_mode
                except (FileNotFoundError, NotADirectoryError):
                    continue
            if stat.S_ISLNK(mode) and name in folders:
                raise SettingsError(
                    f"{path} is a link; in OUT only images/ and quarantine/ may be links: replace it with a folder"
                )
            if stat.S_ISDIR(mode) != (name in folders):
                expected = "folder" if name in folders else "file"
                raise SettingsError(f"{path} is not a {expected}, but a run needs one: remove it or give another --out")

    def contains(self, table: str, names: Iterable[str]) -> bool:
        resolved = Path(table).resolve()
        return any(resolved.is_relative_to((self.root / name).resolve()) for name in names)

    def is_link(self, name: str) -> bool:
        return is_link(self.root / name)

    # The lock

    @contextmanager
    def locked(self) -> Iterator[LocalStore]:
        with locked_folder(self.root, IMAGE_FOLDERS) as pinned:
            yield LocalStore(pinned)

    def find_holder(self) -> str | None:
        return find_holder(self.root)

    # Other files

    def open_log(self, name: str) -> AbstractContextManager[TextIO]:
        return open_log(self.root / name)

    def now(self) -> float:
        """Return the time by the clock of OUT's file server, which may differ from this machine's."""
        probe = temporary_path(self.root / "clock")
        with write_errors(probe):
            probe.touch()
            try:
                return probe.stat().st_mtime
            finally:
                probe.unlink(missing_ok=True)

    @property
    def keeps_file_owners(self) -> bool:
        """True, but some file systems keep none, which `write_private` finds out."""
        return True

    def write_private(self, name: str, content: bytes) -> bool:
        path = self.root / name
        with atomic_write(path, parents=False) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(content)
        with read_errors(path):
            return _is_private(path.lstat())

    def read_private(self, name: str) -> PrivateFile | None:
        path = self.root / name
        with read_errors(path):
            try:
                descriptor = os.open(path, _PRIVATE_FLAGS)
            except FileNotFoundError:
                return None
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(file.fileno())
                content = file.read(PRIVATE_BYTES) if stat.S_ISREG(status.st_mode) else b""
                return PrivateFile(content, status.st_mtime, _is_private(status))


def _is_private(status: os.stat_result) -> bool:
    """Return whether this is a regular file that only this user can read and write. Always True outside POSIX."""
    if os.name != "posix":
        return True
    mode = stat.S_IMODE(status.st_mode)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and mode == 0o600
