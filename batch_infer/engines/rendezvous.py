"""Write and read the rendezvous file in OUT: the address of rank 0 and, without a shared secret, the connections' key.

Other users may be able to write to OUT. The file is therefore trusted only if its owner and mode prove that this user
wrote it, or if the ranks share a secret in their environment.
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

FILE_NAME = ".crew"
SECRET = "BATCH_INFER_LAUNCH_SECRET"
"""Environment variable with a secret that all ranks share. If it is set, the key is derived from it and not stored."""
MAX_BYTES = 4096


class Rendezvous(msgspec.Struct, frozen=True):
    """The address of a launch's rank 0, the key of its connections, and whether rank 0 has ended.

    `key` is in hexadecimal, and empty in a file whose ranks share a secret.
    """

    launch_id: str
    host: str
    port: int
    key: str = ""
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class TrustedRendezvous:
    """A rendezvous, the key of its connections, and when it was written, by the clock of OUT's file system."""

    rendezvous: Rendezvous
    key: bytes
    written_at: float


def write_rendezvous(out: Path, rendezvous: Rendezvous) -> bytes:
    """Write the file and return the key.

    Raises StorageError, and SettingsError if there is no secret and the file cannot prove who wrote it.
    """
    path, secret = out / FILE_NAME, os.environ.get(SECRET)
    if secret:
        rendezvous = msgspec.structs.replace(rendezvous, key="")
    with atomic_write(path, parents=False) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_bytes(msgspec.json.encode(rendezvous))
    if secret:
        return _derive_key(secret)
    if not _is_private(path.lstat()):
        raise SettingsError(
            f"{out} does not store owners and modes of files, so ranks cannot verify who wrote {FILE_NAME}: set "
            f"{SECRET} to the same random text for all ranks"
        )
    return bytes.fromhex(rendezvous.key)


def read_rendezvous(out: Path) -> TrustedRendezvous | str | None:
    """Return the rendezvous in OUT, the reason why its file is ignored, or None if the file is missing or invalid."""
    path, secret = out / FILE_NAME, os.environ.get(SECRET)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    except OSError as error:  # another user's file, or a link
        return f"{path} is ignored: {error.strerror}"
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not secret and not _is_private(status):
            return f"{path} is ignored: other users may have written it; to share OUT, set {SECRET} for all ranks"
        try:
            rendezvous = msgspec.json.decode(file.read(MAX_BYTES), type=Rendezvous)
            key = _derive_key(secret) if secret else bytes.fromhex(rendezvous.key)
            return TrustedRendezvous(rendezvous, key, status.st_mtime)
        except (OSError, ValueError):  # another version wrote the file, or it was read only in part
            return None


def age_seconds(trusted: TrustedRendezvous, out: Path) -> float:
    """Return the age of a rendezvous file in seconds, by comparing it with a file that is written now.

    Both times are from the clock of OUT's file server, which may differ from this machine's. Raises StorageError.
    """
    probe = temporary_path(out / FILE_NAME)
    with write_errors(probe):
        probe.touch()
        try:
            return probe.stat().st_mtime - trusted.written_at
        finally:
            probe.unlink(missing_ok=True)


def remove_rendezvous(out: Path) -> None:
    """Remove the rendezvous file of a launch that has ended or was killed."""
    (out / FILE_NAME).unlink(missing_ok=True)


def _is_private(status: os.stat_result) -> bool:
    """Return whether this is a regular file that only this user can read and write. Always True outside POSIX."""
    if os.name != "posix":
        return True
    mode = stat.S_IMODE(status.st_mode)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and mode == 0o600


def _derive_key(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
