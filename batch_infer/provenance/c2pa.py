"""Sign image files with a C2PA manifest, the Content Credentials of https://spec.c2pa.org, by the library c2pa-python.

Signing uses no timestamp authority and no network.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batch_infer import __version__, images
from batch_infer.errors import SettingsError
from batch_infer.extras import install_command
from batch_infer.settings import C2paSigner, ImageFormat

if TYPE_CHECKING:
    import c2pa

INSTALL = f"--provenance c2pa needs c2pa-python: {install_command('provenance', 'c2pa-python')}"
ALGORITHMS = ("es256", "ed25519", "es384", "es512", "ps256")
"""Signature algorithms of C2PA, one for each kind of key. RSA keys sign with PS256."""
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    # Every new signature is checked, which takes under a millisecond. Whether readers trust it is up to them.
    "verify": {"verify_after_sign": True, "verify_trust": False},
}
_AGENT = {"name": "batch-infer", "version": __version__}


def is_signed(content: bytes) -> bool:
    """Return whether a PNG, JPEG or WebP file contains a C2PA manifest. Its signature is not checked.

    Source: "Embedding manifests into various file formats" in https://spec.c2pa.org.
    """
    if content.startswith(b"RIFF"):
        return b"C2PA" in _list_chunks(content, 12)
    if content.startswith(b"\xff\xd8"):
        return b"\xff\xebJP" in _list_segments(content)
    return b"caBX" in _list_chunks(content, 8)


def _list_chunks(content: bytes, start: int) -> Iterator[bytes]:
    """Yield the names of the chunks of a WebP file or a PNG file."""
    is_riff = content.startswith(b"RIFF")
    while start + 8 <= len(content):
        first, second = content[start : start + 4], content[start + 4 : start + 8]
        yield first if is_riff else second
        # A RIFF chunk has an even size. A PNG chunk ends with a checksum.
        start += 8 + (-(-int.from_bytes(second, "little") // 2) * 2 if is_riff else int.from_bytes(first, "big") + 4)


def _list_segments(content: bytes) -> Iterator[bytes]:
    """Yield the marker of each segment of a JPEG file before its pixels, with the first two bytes of its data."""
    start = 2
    while (marker := content[start : start + 2]) != b"\xff\xda" and marker[:1] == b"\xff":
        yield marker + content[start + 4 : start + 6]
        start += 2 + int.from_bytes(content[start + 2 : start + 4], "big")


class _UnusableFilesError(Exception):
    """A certificate and a key cannot sign."""


class Signer:
    """Signs image files. Threads can share a signer."""

    def __init__(self, files: C2paSigner, *, names_files: bool = False) -> None:
        """Read the certificates and the key, and sign a test image if they are not those of the last signer.

        This signer keeps what it has read. A worker reads the files when it starts. Raises SettingsError, whose
        message contains the paths only with `names_files`: workers write messages to OUT, which others may read.
        """
        certificates_label = f"--c2pa-cert {files.certificates}" if names_files else "--c2pa-cert"
        key_label = f"--c2pa-key {files.private_key}" if names_files else "--c2pa-key"
        certificates, key = _read(files.certificates, certificates_label), _read(files.private_key, key_label)
        if b"-----BEGIN CERTIFICATE-----" not in certificates:
            raise SettingsError(f"{certificates_label} is not a certificate in PEM format")
        _check_key(key, key_label)
        try:
            self._context = _make_context(certificates, key)
        except _UnusableFilesError as error:
            raise SettingsError(f"{certificates_label} and {key_label} cannot sign: {error}") from error

    def sign(self, content: bytes, image_format: ImageFormat, manifest: Mapping[str, Any]) -> bytes:
        """Return the file with this manifest. Raises SettingsError, for example if a certificate has expired."""
        import c2pa

        try:
            return _sign(self._context, content, image_format, manifest)
        except c2pa.C2paError as error:
            raise SettingsError(f"an image cannot be signed with --c2pa-cert and --c2pa-key: {error}") from error


def make_manifest(model: str, fingerprint: str, *, has_watermark: bool) -> dict[str, Any]:
    """Return the manifest of an image that a model has generated, as c2pa-python reads it."""
    created = {
        "action": "c2pa.created",
        "digitalSourceType": SOURCE_TYPE,
        "softwareAgent": _AGENT,
        "parameters": {"model": model, "model_hash": fingerprint},
    }
    watermarked = {"action": "c2pa.watermarked.unbound", "softwareAgent": _AGENT}
    actions = [created, *([watermarked] if has_watermark else [])]
    return {
        "claim_generator_info": [_AGENT],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }


@lru_cache(maxsize=1)
def _make_context(certificates: bytes, key: bytes) -> c2pa.Context:
    """Return c2pa-python's context with the signer of these files' contents, after signing a test image.

    Raises _UnusableFilesError, and SettingsError if the library is not installed.
    """
    try:
        import c2pa
    except ImportError as error:
        raise SettingsError(INSTALL) from error
    test, reasons = images.encode(np.zeros((16, 16, 3), np.uint8), "png", None), []
    for algorithm in ALGORITHMS:
        try:
            signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, certificates, key, None))
            context = c2pa.Context.from_dict(_SETTINGS, signer)
            _sign(context, test, "png", make_manifest("", "", has_watermark=False))
        except c2pa.C2paError as error:
            reasons.append(str(error).removeprefix("Signature: "))
        else:
            return context
    others = [reason for reason in reasons if "private key" not in reason]  # keys of other algorithms
    raise _UnusableFilesError((others or reasons)[0])


def _check_key(content: bytes, label: str) -> None:
    """Raise SettingsError unless this is an unencrypted private key in PKCS #8, the only form that c2pa reads."""
    if b"ENCRYPTED" in content:
        raise SettingsError(f"{label} is encrypted: use a key without a passphrase")
    if b"-----BEGIN PRIVATE KEY-----" in content:
        return
    if b"PRIVATE KEY-----" in content:
        raise SettingsError(f"{label} is not in PKCS #8: convert it with `openssl pkcs8 -topk8 -nocrypt`")
    raise SettingsError(f"{label} is not a private key in PEM format")


def _sign(context: c2pa.Context, content: bytes, image_format: ImageFormat, manifest: Mapping[str, Any]) -> bytes:
    """Return the signed file. Raises C2paError."""
    import c2pa

    signed = io.BytesIO()
    c2pa.Builder(dict(manifest), context).sign(f"image/{image_format}", io.BytesIO(content), signed)
    return signed.getvalue()


def _read(path: str, label: str) -> bytes:
    """Read a file. Raises SettingsError without its cause, whose message contains the path."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"{label}: {error.strerror or type(error).__name__}") from None
