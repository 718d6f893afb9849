"""Sign SHA256SUMS with an Ed25519 key, and check such signatures. The keys are PEM files, as openssl writes them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from batch_infer.errors import SettingsError
from batch_infer.extras import install_command

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

INSTALL = f"--sign-key and --public-key need cryptography: {install_command('sign')}"


def check_sign_key(path: str | None) -> None:
    """Check that a private key can be used, unless `path` is None. Raises SettingsError.

    The key stays in memory, so that a run can sign at its end even if the file has been removed by then.
    """
    if path is not None:
        _read_private_key(path)


def sign(content: bytes, path: str) -> bytes:
    """Return the 64-byte signature of `content` by the private key in the file `path`. Raises SettingsError."""
    return _read_private_key(path).sign(content)


def read_public_key(path: str) -> Ed25519PublicKey:
    """Return the public key in a file. Raises SettingsError."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise SettingsError(INSTALL) from error
    try:
        key = load_pem_public_key(_read(path, "--public-key"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(
            f"--public-key {path} is not a public key in PEM format; `openssl pkey -pubout` extracts it from a private "
            "key"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise SettingsError(f"--public-key {path} is not an Ed25519 key")
    return key


def is_valid_signature(key: Ed25519PublicKey, content: bytes, signature: bytes) -> bool:
    """Return whether `signature` is that of `content` by the private half of this key."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=1)
def _read_private_key(path: str) -> Ed25519PrivateKey:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise SettingsError(INSTALL) from error
    try:
        key = load_pem_private_key(_read(path, "--sign-key"), password=None)
    except TypeError as error:
        raise SettingsError(f"--sign-key {path} is encrypted: use a key without a passphrase") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"--sign-key {path} is not a private key in PEM format") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(
            f"--sign-key {path} is not an Ed25519 key: create one with `openssl genpkey -algorithm ed25519`"
        )
    return key


def _read(path: str, option: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"{option} {path}: {error.strerror or error}") from error
