"""Adapt the supervisor's settings to another machine: find the model there, and check that OUT is the same folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from batch_infer.errors import ModelError, SettingsError
from batch_infer.models import ModelCard, read_card
from batch_infer.settings import ModelSettings
from batch_infer.store import StoreAddress, is_url, open_store
from batch_infer.worker import WorkerSettings


def localize(settings: WorkerSettings, model: ModelSettings, node: str) -> WorkerSettings:
    """Return the supervisor's settings with the model and the folder OUT as seen by a node of a cluster.

    Raises ModelError and SettingsError, which name the node.
    """
    out = _find_out(settings.out, node)
    return replace(settings, card=_find_model(settings, model, node), out=out)


def with_absolute_paths(model: ModelSettings) -> ModelSettings:
    """Return the settings for processes in another folder: with absolute paths of all local files."""
    path = None if model.name is None else Path(model.name).expanduser()
    name = str(path.absolute()) if path is not None and path.exists() else model.name
    loras = tuple(replace(lora, file=str(Path(lora.file).expanduser().absolute())) for lora in model.loras)
    lora_folder = model.lora_folder and str(Path(model.lora_folder).expanduser().absolute())
    embeddings = tuple(replace(spec, file=str(Path(spec.file).expanduser().absolute())) for spec in model.embeddings)
    return replace(model, name=name, loras=loras, lora_folder=lora_folder, embeddings=embeddings)


def check_same_model(card: ModelCard, settings: WorkerSettings, here: str, there: str) -> None:
    """Raise ModelError if the model of `here` has other fingerprints than the supervisor's, which is `there`."""
    fingerprints = (settings.card.fingerprint, settings.card.scheduler_fingerprint)
    if (card.fingerprint, card.scheduler_fingerprint) != fingerprints:
        raise ModelError(f"{here}: {card.name} differs from {there}'s model of that name; both need the same files")


def _find_model(settings: WorkerSettings, model: ModelSettings, node: str) -> ModelCard:
    if settings.card.revision is not None:  # the commit that the driver uses, even if the branch has moved on
        model = replace(model, revision=settings.card.revision)
    needs_checker = settings.safety.uses_checker(has_checker=True)
    try:
        with _first_on_node(settings.card):
            card = read_card(model, needs_checker=needs_checker)
    except ModelError as error:
        raise ModelError(f"node {node}: {error}") from error
    check_same_model(card, settings, f"node {node}", "the driver")
    return card


@contextmanager
def _first_on_node(card: ModelCard) -> Iterator[None]:
    """Hold a lock while the model is not in the cache, so that one process downloads or converts it and others wait."""
    if card.path.is_dir():
        yield
        return
    folder = user_cache_path("batch-infer")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"the cache cannot be written: {error}") from error
    with FileLock(folder / f"{card.fingerprint}.lock"):
        yield


def _find_out(out: StoreAddress, node: str) -> StoreAddress:
    """Return the address of OUT on this machine. Raises SettingsError if the run's marker is missing in a folder."""
    if is_url(out.location):
        return out
    store = open_store(out.location)
    if out.marker is not None and not store.exists(out.marker):
        raise SettingsError(
            f"node {node} does not see this run's files in {out.location}: --out must be a folder on a disk that all "
            "nodes share, or the URL of an object store"
        )
    return replace(store.address, marker=out.marker)
