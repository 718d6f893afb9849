"""Lock the output folder OUT, read and write its run.json, and refuse an OUT that a run must not write to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from batch_infer.errors import BatchInferError, SettingsError, StorageError, UsageError, first_line
from batch_infer.jobs.run_json import parse_record, require
from batch_infer.settings import METADATA, RESULTS_FILES, SHARED_NAMES
from batch_infer.sinks import SHARD_FOLDER
from batch_infer.store import IMAGE_FOLDERS, Out, Store, is_abandoned, is_temporary, open_store
from batch_infer.terminal import quote_command

FOLDERS = (*IMAGE_FOLDERS, SHARD_FOLDER, "manifest", "logs")
RESULTS = (*(name for names in RESULTS_FILES.values() for name in names), METADATA)
RUN_JSON = "run.json"
OWN_NAMES = (*FOLDERS, *(name for name in RESULTS if name not in SHARED_NAMES), RUN_JSON)
_REMEDY = "restore it from a copy, or remove it to continue from the manifest, or start anew in another --out"
CLEARING = "overwriting"
"""Key that run.json contains from when --overwrite begins to remove the old files of OUT until all are removed."""
GALLERY_FOLDER = "gallery"
"""The folder of the gallery. Tables in it are refused, and --overwrite removes it."""
GALLERY = f"{GALLERY_FOLDER}/index.html"


@contextmanager
def locked(out: Out) -> Iterator[Store]:
    """Lock OUT, creating it if missing, and yield the store to write with.

    Remove from OUT, but not from its subfolders, the temporary files of dead processes on this machine and all
    temporary results files, which only the lock holder writes. An OSError for a path in OUT becomes StorageError.
    Raises LockedError, SettingsError, StorageError.
    """
    with open_store(out).locked() as store:
        store.remove(
            list(store.find([""], lambda name: is_abandoned(name) or (is_temporary(name) and name.endswith(RESULTS))))
        )
        yield store


def read_run(store: Store) -> dict[str, Any] | None:
    """Return run.json after checking its types, or None if it does not exist. Raises UsageError, StorageError."""
    path = store.locate(RUN_JSON)
    try:
        content = store.read(RUN_JSON)
    except StorageError as error:
        if isinstance(cause := error.__cause__, (PermissionError, IsADirectoryError)):
            raise UsageError(f"{path} cannot be read: {cause.strerror}") from error
        raise
    if content is None:
        return None
    try:
        record = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}; {_REMEDY}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path} is not a JSON object; {_REMEDY}")
    try:
        parse_record(record)
    except ValueError as error:
        raise UsageError(f"{path} is damaged or was edited: {error}; {_REMEDY}") from error
    return record


def read_existing_run(store: Store) -> dict[str, Any]:
    """Return run.json. Raises StorageError and UsageError.

    UsageError means that OUT contains no run, that run.json is damaged, or that `run --overwrite` was stopped while
    clearing OUT.
    """
    record = read_run(store)
    if not record or "identity" not in record:
        raise UsageError(f"{store.location} contains no run: it has no run.json written by batch-infer")
    if record.get(CLEARING):
        raise UsageError(
            f"{store.location}: `run --overwrite` was stopped while removing old files; run again to continue"
        )
    return record


def write_run(store: Store, record: Mapping[str, Any]) -> None:
    """Replace run.json. Raises StorageError."""
    with store.write(RUN_JSON) as temporary:
        temporary.write_bytes(_to_json(record))


def create_run_json(store: Store, record: Mapping[str, Any]) -> None:
    """Write run.json unless it exists. Of several processes that start together, one writes it. Raises StorageError."""
    store.create(RUN_JSON, _to_json(record))


def _to_json(record: Mapping[str, Any]) -> bytes:
    # ASCII-only JSON escapes the surrogates in file names that are not valid UTF-8.
    return (json.dumps(record, indent=2, default=str) + "\n").encode("ascii")


def find_gallery(out: Out) -> str | None:
    """Return the path or URL of OUT's gallery, or None if there is none or OUT cannot be read now."""
    with suppress(BatchInferError):
        store = open_store(out)
        return store.locate(GALLERY) if store.exists(GALLERY) else None
    return None


def refuse_foreign_files(store: Store, tables: Iterable[str], earlier: Mapping[str, Any] | None) -> None:
    """Raise SettingsError if a run would overwrite or remove its own tables or another program's files.

    `tables` are paths and URLs. Also raise it for the reasons of `Store.check_kinds`. Raises StorageError.
    """
    store.check_kinds(FOLDERS, (*RESULTS, RUN_JSON))
    for table in tables:
        if store.contains(table, (*OWN_NAMES, GALLERY_FOLDER)):
            raise SettingsError(
                f"{table} is in a folder that a run into {store.location} writes to: give another --out"
            )
    if _has_no_run(store, earlier):
        for name in OWN_NAMES:
            if name in RESULTS and store.exists(name):
                raise SettingsError(f"{store.locate(name)} was not written by batch-infer: give another --out")


def refuse_foreign_images(store: Store, earlier: Mapping[str, Any] | None) -> None:
    """Raise SettingsError if a folder that --overwrite removes contains files before the first run.

    A linked folder may, because --overwrite keeps them. This is not for endpoints, whose workers start at the same
    time. Raises StorageError.
    """
    if not _has_no_run(store, earlier):
        return
    for folder in FOLDERS:
        if folder == "logs" or store.is_link(folder):
            continue
        has_files = any(store.find([folder], lambda name: not is_temporary(name)))
        if has_files and _has_no_run(store, read_run(store)):  # another command may have started the first run
            raise SettingsError(
                f"{store.locate(folder)} contains files, but {store.location} contains no run: move them away, or give "
                "another --out"
            )


def _has_no_run(store: Store, record: Mapping[str, Any] | None) -> bool:
    """Return whether OUT has neither a run.json that a run wrote nor manifest parts."""
    has_identity = "identity" in (record or {})
    return not has_identity and not any(name.startswith("part-") for name in store.list_folder("manifest"))


def refuse_while_rescoring(out: str, record: Mapping[str, Any] | None) -> None:
    """Raise UsageError if a rescore is unfinished, since OUT then contains results under different safety settings."""
    if (record or {}).get("rescoring"):
        mode = require(parse_record(record).settings, "settings", out).safety.mode
        command = quote_command("rescore", out, "--safety", mode)
        raise SettingsError(
            f"a rescore of {out} is unfinished: continue it with {command} and its other options, or start anew with "
            "`run --overwrite`"
        )


def refuse_to_clear(store: Store) -> None:
    """Raise UsageError if OUT may contain another program's files or run.json is damaged. Raises StorageError."""
    names = (name for name in OWN_NAMES if name != "logs")  # a run that fails to start creates only logs/
    if "identity" not in (read_run(store) or {}) and any(map(store.exists, names)):
        raise SettingsError(
            f"--overwrite: {store.location} has no run.json written by batch-infer, so its files may belong to another"
            " program; remove them yourself"
        )
