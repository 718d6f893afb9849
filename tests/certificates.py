"""Make certificates and private keys that can sign C2PA manifests."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = dt.timedelta(days=1)
PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class SigningFiles:
    """The chain of a signer's certificate and its private key in files, and the root certificate as PEM."""

    chain: Path
    key: Path
    root: str

    @property
    def options(self) -> tuple[str, ...]:
        return "--c2pa-cert", str(self.chain), "--c2pa-key", str(self.key)


def write_signing_files(folder: Path, *, expired: bool = False) -> SigningFiles:
    """Write a new key and its certificate, which a new root certifies, for signing with ES256."""
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certify("Test root", root_key.public_key(), root_key)
    start = dt.datetime.now(dt.timezone.utc) - (60 if expired else 1) * DAY
    leaf = _certify("Test signer", key.public_key(), root_key, start)
    chain, key_file = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(leaf.public_bytes(PEM) + root.public_bytes(PEM))
    key_file.write_bytes(encode_key(key))
    return SigningFiles(chain, key_file, root.public_bytes(PEM).decode())


def encode_key(
    key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
    passphrase: bytes | None = None,
) -> bytes:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(PEM, form, encryption)


def _certify(
    name: str,
    key: ec.EllipticCurvePublicKey,
    root_key: ec.EllipticCurvePrivateKey,
    start: dt.datetime | None = None,
) -> x509.Certificate:
    """Return a certificate that is valid for 30 days from `start`, or a root certificate without a start."""
    is_root = start is None
    start = start or dt.datetime.now(dt.timezone.utc) - 365 * DAY
    builder = (
        x509.CertificateBuilder()
        .subject_name(_make_name(name))
        .issuer_name(_make_name("Test root"))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + (3650 if is_root else 30) * DAY)
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(_make_usage(is_root=is_root), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
    )
    if not is_root:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(root_key, hashes.SHA256())


def _make_usage(*, is_root: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_root,
        key_cert_sign=is_root,
        crl_sign=is_root,
        **dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"),
            False,
        ),
    )  # fmt: skip


def _make_name(name: str) -> x509.Name:
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test")
    return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, name)])
