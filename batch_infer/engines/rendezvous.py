"""Write and read the rendezvous file in OUT: the address of rank 0 and, without a shared secret, the connections' key.

Other users may be able to write to OUT. The file is therefore trusted only if its owner and mode prove that this user
wrote it, or if the ranks share a secret in their environment.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import msgspec

from batch_infer.errors import SettingsError, StorageError
from batch_infer.store import Store

FILE_NAME = ".crew"
SECRET = "BATCH_INFER_LAUNCH_SECRET"
"""Environment variable with a secret that all ranks share. If it is set, the key is derived from it and not stored."""


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
    """A rendezvous, the key of its connections, and when it was written, by the clock of OUT's storage."""

    rendezvous: Rendezvous
    key: bytes
    written_at: float


def write_rendezvous(store: Store, rendezvous: Rendezvous) -> bytes:
    """Write the file and return the key.

    Raises StorageError, and SettingsError if there is no secret and the file cannot prove who wrote it. The key is then
    not stored, or removed.
    """
    secret = os.environ.get(SECRET)
    if secret:
        store.write_private(FILE_NAME, msgspec.json.encode(msgspec.structs.replace(rendezvous, key="")))
        return _derive_key(secret)
    if store.keeps_file_owners:
        if store.write_private(FILE_NAME, msgspec.json.encode(rendezvous)):
            return bytes.fromhex(rendezvous.key)
        remove_rendezvous(store)
    raise SettingsError(
        f"{store.location} does not store owners and modes of files, so ranks cannot verify who wrote {FILE_NAME}:"
        f" set {SECRET} to the same random text for all ranks"
    )


def read_rendezvous(store: Store) -> TrustedRendezvous | str | None:
    """Return the rendezvous in OUT, the reason why its file is ignored, or None if the file is missing or invalid."""
    path, secret = store.locate(FILE_NAME), os.environ.get(SECRET)
    try:
        file = store.read_private(FILE_NAME)
    except StorageError as error:  # another user's file, a link, or storage that does not answer
        return f"{path} is ignored: {getattr(error.__cause__, 'strerror', None) or error}"
    if file is None:
        return None
    if not secret and not file.is_trusted:
        return f"{path} is ignored: other users may have written it; to share OUT, set {SECRET} for all ranks"
    try:
        rendezvous = msgspec.json.decode(file.content, type=Rendezvous)
        key = _derive_key(secret) if secret else bytes.fromhex(rendezvous.key)
        return TrustedRendezvous(rendezvous, key, file.written_at)
    except ValueError:  # another version wrote the file, or it was read only in part
        return None


def age_seconds(trusted: TrustedRendezvous, store: Store) -> float:
    """Return the age of a rendezvous file in seconds. Raises StorageError."""
    return store.now() - trusted.written_at


def remove_rendezvous(store: Store) -> None:
    """Remove the rendezvous file of a launch that has ended or was killed."""
    store.remove([FILE_NAME])


def _derive_key(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
