"""The note in OUT by which the ranks of a launcher find rank 0, and the key that both sides of a connection must know.

Others may be able to write into OUT. So a note counts where its owner and mode prove that this user wrote it, or where
the key comes with the launcher's environment.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import msgspec

from batch_infer.errors import SettingsError
from batch_infer.store import atomic_write, temporary_path, write_errors

MEETING = ".crew"
SECRET = "BATCH_INFER_LAUNCH_SECRET"
"""The variable with a secret that all ranks share; the note then has no key."""
MOST_BYTES = 4096


class Note(msgspec.Struct, frozen=True):
    """How rank 0 of a launch is reached, or that it has ended."""

    launch: str
    host: str
    port: int
    key: str = ""
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """A note that can be trusted, the key for the connection, and when the note was written by OUT's file system."""

    note: Note
    key: bytes
    written_at: float


def write_note(out: Path, note: Note) -> bytes:
    """Write rank 0's note and return the key. Raises SettingsError where the note does not prove who wrote it."""
    if secret := os.environ.get(SECRET):
        note = msgspec.structs.replace(note, key="")
    with atomic_write(out / MEETING, parents=False) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_bytes(msgspec.json.encode(note))
    if secret:
        return _derived(secret)
    status = (out / MEETING).lstat()
    if not _is_own(status):
        raise SettingsError(
            f"{out} keeps no owners and modes of files, by which ranks know who wrote {MEETING}: set {SECRET} to one "
            "random text for all ranks"
        )
    return bytes.fromhex(note.key)


def read_note(out: Path) -> Read | str | None:
    """Return the note in OUT, None where there is none that can be read, or why it does not count."""
    secret = os.environ.get(SECRET)
    try:
        descriptor = os.open(out / MEETING, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    except OSError as error:  # another's file, or a link
        return f"{out / MEETING} is ignored: {error.strerror}"
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not secret and not _is_own(status):
            return f"{out / MEETING} is ignored: it is not a file of this user alone (set {SECRET} for all ranks)"
        try:
            note = msgspec.json.decode(file.read(MOST_BYTES), type=Note)
            return Read(note, _derived(secret) if secret else bytes.fromhex(note.key), status.st_mtime)
        except (OSError, ValueError):  # of another version, or half read
            return None


def age_of(found: Read, out: Path) -> float:
    """Return the seconds since a note in OUT was written. Raises StorageError.

    A file that is written now gives the time: a file server's clock need not agree with this machine's.
    """
    probe = temporary_path(out / MEETING)
    with write_errors(probe):
        probe.touch()
        try:
            return probe.stat().st_mtime - found.written_at
        finally:
            probe.unlink(missing_ok=True)


def _is_own(status: os.stat_result) -> bool:
    if os.name != "posix":
        return True
    mode = stat.S_IMODE(status.st_mode)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and mode == 0o600


def _derived(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
