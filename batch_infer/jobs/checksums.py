"""Keep the SHA-256 of all manifest parts and results files in manifest/SHA256SUMS, and check them.

Parts name the SHA-256 of each image, so the SHA-256 of this file, the root digest, covers all results and images.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from batch_infer.errors import SettingsError, StorageError, UsageError
from batch_infer.jobs.out import RESULTS, write_run
from batch_infer.jobs.signing import is_valid_signature, read_public_key, sign
from batch_infer.manifest import FOLDER, Manifest, read_part, run_number
from batch_infer.settings import SHARED_NAMES, ResultsFormat, list_results_files
from batch_infer.store import Store, StoredFile, hash_stream, prefetch
from batch_infer.terminal import quote_command

CHECKSUMS = f"{FOLDER}/SHA256SUMS"
SIGNATURE = f"{CHECKSUMS}.sig"
ROOT_DIGEST = "root_digest"
"""Key of run.json for the SHA-256 of SHA256SUMS."""
READING_THREADS = 8
MAX_NAMED = 3
"""Maximum number of parts that an error names."""
_LINE = re.compile(rf"([0-9a-f]{{64}})  (manifest/part-[^/]+\.parquet|{'|'.join(map(re.escape, RESULTS))})")
"""A line that this module writes. An edited file must not name files outside OUT."""
_MISSING = "it is missing"

log = logging.getLogger("batch_infer")


def write_checksums(store: Store, results: Mapping[str, str], sign_key: str | None = None) -> str:
    """Write SHA256SUMS for the current parts and for these results files. Return the root digest.

    `results` maps the names of the results files to the digests that were computed while they were written. A part
    never changes, so one that the previous SHA256SUMS lists keeps its digest: hashing it again would accept any damage
    since. Parts of endpoints, whose names lack a run number, may be written again, so they are hashed again. With
    `sign_key`, the path of a private key, also write the signature. Otherwise, remove the signature of the previous
    file. Raises StorageError, SettingsError.
    """
    previous, parts = read_checksums(store), Manifest(store).parts()
    digests = {part.path: previous[part.path] for part in parts if part.path in previous and run_number(part)}
    new = [part for part in parts if part.path not in digests]
    for part, digest in zip(new, hash_files(new), strict=True):
        if isinstance(digest, str):
            digests[part.path] = digest
        elif store.exists(part.path):
            raise StorageError(f"cannot read {part}: {digest.reason}")
    content = "".join(f"{digest}  {name}\n" for name, digest in sorted({**digests, **results}.items())).encode()
    if store.exists(SIGNATURE):
        if sign_key is None:
            log.warning(
                "removed %s, because results.* were written without --sign-key. Run %s to sign again",
                store.locate(SIGNATURE),
                quote_command("merge", store.location, "--sign-key", "FILE"),
            )
        store.remove([SIGNATURE])  # first, since it does not fit the new file
    _write(store, CHECKSUMS, content)
    if sign_key is not None:
        _write(store, SIGNATURE, sign(content, sign_key))
    return hashlib.sha256(content).hexdigest()


def add_root_digest(store: Store, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return run.json with the root digest of the present SHA256SUMS. Raises StorageError."""
    content = store.read(CHECKSUMS)
    others = {name: value for name, value in record.items() if name != ROOT_DIGEST}
    return others if content is None else {**others, ROOT_DIGEST: hashlib.sha256(content).hexdigest()}


def remove_root_digest(store: Store, record: Mapping[str, Any]) -> None:
    """Remove the root digest from run.json, because a kill while results.* are replaced would leave it wrong."""
    if ROOT_DIGEST in record:
        write_run(store, {name: value for name, value in record.items() if name != ROOT_DIGEST})


def read_checksums(store: Store) -> dict[str, str]:
    """Return the digest of each file that SHA256SUMS lists, without malformed lines. Empty without SHA256SUMS."""
    return {match[2]: match[1] for line in _split(store.read(CHECKSUMS)) if (match := _LINE.fullmatch(line))}


def find_results(store: Store) -> list[str]:
    """Return the names of the results files in OUT, without files of other programs. Raises StorageError."""
    listed = read_checksums(store)
    return [name for name in RESULTS if (name in listed or name not in SHARED_NAMES) and store.exists(name)]


def refuse_foreign_results(store: Store, formats: Iterable[ResultsFormat]) -> None:
    """Raise SettingsError if results in these formats would replace another program's files. Raises StorageError."""
    for name in set(list_results_files(formats)) & set(SHARED_NAMES):
        if name not in read_checksums(store) and store.exists(name):
            raise SettingsError(
                f"{store.locate(name)} is not listed in {CHECKSUMS}, so it may belong to another program, and "
                "--results openai would replace it: move it away"
            )


def find_changed_parts(store: Store) -> set[str]:
    """Return the names of the parts whose SHA-256 differs from that in SHA256SUMS or that cannot be read.

    Raises StorageError.
    """
    recorded = read_checksums(store)
    parts = [part for part in Manifest(store).parts() if part.path in recorded]
    return {part.name for part, digest in zip(parts, hash_files(parts), strict=True) if digest != recorded[part.path]}


def refuse_changed_parts(store: Store, record: Mapping[str, Any]) -> None:
    """Raise UsageError if a part that SHA256SUMS lists is missing or has another SHA-256.

    results.* may be the only copy of its rows. Without a root digest in run.json, a run has not ended and may have
    combined parts, so only its parts tell what is committed. Parts of endpoints may be written again. Raises
    DamagedPartError for a part that cannot be read, because the next run sets it aside, and StorageError.
    """
    listed = [name for name in read_checksums(store) if name not in RESULTS and run_number(StoredFile(store, name))]
    if ROOT_DIGEST not in record or not listed:
        return
    existing = {part.path for part in Manifest(store).parts()}
    changed = {f"{FOLDER}/{name}" for name in find_changed_parts(store)}
    for name in changed:
        read_part(StoredFile(store, name))
    reasons = [
        f"{name} {'has changed' if name in existing else 'is missing'}"
        for name in listed
        if name not in existing or name in changed
    ]
    if reasons:
        more = f" and {len(reasons) - MAX_NAMED:,} more" if len(reasons) > MAX_NAMED else ""
        raise UsageError(
            f"parts of {store.location} differ from {CHECKSUMS} ({', '.join(reasons[:MAX_NAMED])}{more}), and results.*"
            " may be the only copy of their rows: restore these parts from a copy, or remove those that have changed "
            "and run the tables again to render their rows. To merge the manifest as it is, remove "
            f"{store.locate(CHECKSUMS)}"
        )


@dataclass(slots=True)
class ChecksumCheck:
    """Result of `check_checksums`. `problems` are (path, reason), and `matching` the files with the listed digest.

    `is_proof` is whether run.json names the root digest, it is that of SHA256SUMS, and all listed files match.
    `has_intact_results` is whether this holds except for some listed parts, so that results.parquet is right where it
    differs from the parts. `has_root` is whether the root digest is that of SHA256SUMS, and `is_signed` whether its
    signature is valid.
    """

    problems: list[tuple[str, str]] = field(default_factory=list)
    matching: set[str] = field(default_factory=set)
    is_proof: bool = False
    has_intact_results: bool = False
    has_root: bool = False
    is_signed: bool = False


def check_checksums(store: Store, record: Mapping[str, Any], public_key: str | None = None) -> ChecksumCheck:
    """Hash every file that SHA256SUMS lists, and find those that differ, are missing or are not listed.

    Without a root digest in run.json, an earlier version wrote OUT or a run has not ended, so only existing parts that
    differ are problems. At an endpoint and after a lost worker, other parts may have been added. With `public_key`, the
    path of a key, a missing or invalid signature is a problem too, and so is each file that the signature does not
    cover, because run.json is not signed. Raises StorageError, SettingsError.
    """
    check, content = ChecksumCheck(), store.read(CHECKSUMS)
    root, recorded = record.get(ROOT_DIGEST), read_checksums(store)
    if public_key is not None:
        check.problems += _check_signature(store, content, public_key)
    if root is not None:
        check.problems += _check_root(content, root, recorded)
    is_signed, is_strict = public_key is not None, root is not None or public_key is not None
    may_have_others = not record["settings"]["table"]["tables"] or record.get("has_strays")
    files = [StoredFile(store, name) for name in recorded]
    for file, digest in zip(files, hash_files(files), strict=True):
        if digest == recorded[file.path]:
            check.matching.add(file.path)
        elif isinstance(digest, str) and (is_strict or file.path not in RESULTS):
            check.problems.append((file.path, f"its SHA-256 is {digest}, but {CHECKSUMS} lists {recorded[file.path]}"))
        elif isinstance(digest, Unreadable) and (is_strict or not digest.is_missing):
            check.problems.append((file.path, digest.reason))
    check.is_proof = root is not None and not check.problems
    bad_paths = {path for path, _ in check.problems}
    check.has_root = root is not None and CHECKSUMS not in bad_paths
    check.is_signed = is_signed and SIGNATURE not in bad_paths
    if content is not None and is_strict:
        unlisted_parts = [part.path for part in Manifest(store).parts() if part.path not in recorded]
        has_only_bad_parts = bool(bad_paths) and bad_paths <= recorded.keys() - set(RESULTS)
        check.has_intact_results = root is not None and has_only_bad_parts and not unlisted_parts
        unlisted = [name for name in find_results(store) if name not in recorded]
        if is_signed or not may_have_others:
            unlisted += unlisted_parts
        check.problems += [(name, f"{CHECKSUMS} does not list it") for name in unlisted]
        check.is_proof = check.is_proof and not unlisted
    return check


def _check_root(content: bytes | None, root: str, listed: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if content is None:
        yield CHECKSUMS, _MISSING
    elif (digest := hashlib.sha256(content).hexdigest()) != root:
        yield CHECKSUMS, f"its SHA-256 is {digest}, but run.json names {root}"
    elif len(listed) != len(_split(content)):
        yield CHECKSUMS, "it has malformed or repeated lines"


def _check_signature(store: Store, content: bytes | None, public_key: str) -> Iterator[tuple[str, str]]:
    key, signature = read_public_key(public_key), store.read(SIGNATURE)
    if signature is None or content is None:
        yield SIGNATURE, _MISSING
    elif not is_valid_signature(key, content, signature):
        yield SIGNATURE, f"it is not this key's signature of {CHECKSUMS}"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The reason why a file has no digest."""

    reason: str
    is_missing: bool = False


def hash_files(files: Iterable[StoredFile]) -> Iterator[str | Unreadable]:
    """Yield the SHA-256 of each file, which must not change, as hexadecimal digits. Files are read concurrently.

    Yield Unreadable for a file that is missing or whose bytes the disk has lost. Raises StorageError.
    """
    with ThreadPoolExecutor(READING_THREADS) as pool:
        remaining = prefetch(files)
        while batch := list(islice(remaining, 4 * READING_THREADS)):
            yield from pool.map(_hash_file, batch)


def _hash_file(file: StoredFile) -> str | Unreadable:
    try:
        with file.store.open_file(file.path) as stream:
            return hash_stream(stream.read)
    except FileNotFoundError:
        return Unreadable(_MISSING, is_missing=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno == errno.EIO:
            return Unreadable(f"it cannot be read: {reason}")
        raise StorageError(f"cannot read {file}: {reason}") from error


def _split(content: bytes | None) -> list[str]:
    return (content or b"").decode("utf-8", "replace").splitlines()


def _write(store: Store, name: str, content: bytes) -> None:
    with store.write(name) as temporary:
        temporary.write_bytes(content)
