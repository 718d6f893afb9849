"""Keep local copies of objects in a temporary folder: files to upload, and logs."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from batch_infer.errors import StorageError
from batch_infer.records import utc_now
from batch_infer.store.files import is_abandoned, unique_name
from batch_infer.store.temporary import temporary_file_errors

PREFIX = "batch-infer-spool-"
UPLOAD_SECONDS = 60.0
"""Seconds between two uploads of a log."""
_OUT, _LOGS = "out", "logs"


class Spool:
    """A temporary folder of this process for one OUT. All methods may raise StorageError that names the folder.

    It is removed when the process ends, except for logs that were not uploaded. After a kill, another process of this
    machine removes it.
    """

    def __init__(self, out: str) -> None:
        with temporary_file_errors():
            name = unique_name(PREFIX, secrets.token_hex(4))
            self.folder = Path(tempfile.gettempdir()) / name
            self.folder.mkdir(mode=0o700)
            (self.folder / _OUT).write_text(out, "utf-8")
        self._finalizer = weakref.finalize(self, _remove, self.folder, os.getpid())

    def staged_path(self, name: str) -> Path:
        """Return the path for an image until it is published."""
        return self.folder / "staged" / name

    def stage(self, name: str, content: bytes) -> None:
        path = self.staged_path(name)
        with temporary_file_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    @contextmanager
    def new_path(self, name: str) -> Iterator[Path]:
        """Yield an unused path with this file name, and remove it and its folder afterwards."""
        with temporary_file_errors():
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            try:
                yield folder / name
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def make_missing_error(self, action: str, path: Path) -> StorageError:
        """Return an error that says that `action` has failed, because a file or folder in the spool is missing."""
        return StorageError(
            f"{action}: {path} is missing; set TMPDIR to a folder in which no other program removes"
            " files, and run again"
        )

    def log_path(self, name: str) -> Path:
        """Return a path for a log, which is uploaded as `name`, and create its folder."""
        path = self.folder / _LOGS / name
        with temporary_file_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _remove(folder: Path, process: int) -> None:
    """Remove a spool, but keep its logs if there are any: their last upload failed."""
    if os.getpid() != process:  # a fork of the process that owns the spool
        return
    if any(list_logs(folder)):
        _remove_all_but_logs(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_all_but_logs(folder: Path) -> None:
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and path.name != _LOGS:
                shutil.rmtree(path, ignore_errors=True)


def list_logs(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the names and paths of the logs in a spool."""
    logs = folder / _LOGS
    for path in sorted(logs.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(logs).as_posix(), path


def collect_abandoned(out: str, upload: Callable[[str, Path], bool]) -> None:
    """Remove the spools of dead processes of this user, and pass the logs for `out` to `upload` before.

    A spool is kept while it has logs for which `upload` returns False, or logs for another OUT.
    """
    with suppress(OSError):
        for folder in sorted(Path(tempfile.gettempdir()).iterdir()):
            if is_abandoned(folder.name, PREFIX) and _is_own(folder):
                _remove_all_but_logs(folder)
                logs = list(list_logs(folder))
                if logs and _read_out(folder) == out:
                    logs = [(name, path) for name, path in logs if not upload(name, path)]
                if not logs:
                    shutil.rmtree(folder, ignore_errors=True)


def _is_own(folder: Path) -> bool:
    """Return whether a path is a folder that belongs to this user. Others may write to the temporary folder too."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _read_out(folder: Path) -> str | None:
    try:
        return (folder / _OUT).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


# Logs


def make_log_name(name: str) -> str:
    """Return a variant of the name of a log that no other process or log uses, because objects cannot be extended."""
    path = PurePosixPath(name)
    host = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node()) or "host"
    return str(path.with_name(f"{path.stem}-{utc_now():%Y%m%dT%H%M%S.%fZ}-{host}-{os.getpid()}{path.suffix}"))


@contextmanager
def upload_while_open(path: Path, upload: Callable[[], bool]) -> Iterator[None]:
    """Call `upload` in the background whenever a log has grown, and at the end, and then remove the log."""
    closed = threading.Event()
    uploaded_size = 0

    def upload_if_grown() -> bool:
        nonlocal uploaded_size
        size = path.stat().st_size if path.exists() else 0
        if size != uploaded_size and upload():
            uploaded_size = size
        return size == uploaded_size

    def run() -> None:
        while not closed.wait(UPLOAD_SECONDS):
            upload_if_grown()

    thread = threading.Thread(target=run, name="log upload", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()
        if upload_if_grown():
            path.unlink(missing_ok=True)
