"""Download only the required files from a repository on the Hugging Face Hub."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from batch_infer.errors import ModelError, first_line
from batch_infer.models.untrusted import CONFIG_SUFFIXES, choose_variant, choose_weights, refuse_pickles

INDEX = "model_index.json"
TOKEN_HINT = "for a private or gated model set HF_TOKEN"

log = logging.getLogger("batch_infer")


def fetch_index(name: str, revision: str | None) -> Path:
    """Download a repository's model_index.json unless it is cached, and return its folder in the local cache.

    The folder has the name of the revision's commit. Raises ModelError.
    """
    from huggingface_hub import hf_hub_download

    with _hub_errors(name, revision):
        return Path(hf_hub_download(name, INDEX, revision=revision)).parent


def fetch(name: str, folder: Path, components: Collection[str], variant: str | None) -> None:
    """Download the components' configs, vocabularies and safetensors into the folder returned by `fetch_index`.

    Components without weights of `variant` use their default weights. Raises ModelError: before any download if files
    are missing or only pickled, or if no component has weights of `variant`; later if a download fails.
    """
    files, note = _list_files(name, folder)
    candidates = {
        component: [file for file in files if file.parent == PurePosixPath(component)] for component in components
    }
    if variant and not any(choose_variant(component_files, variant) for component_files in candidates.values()):
        raise ModelError(f"{name} has no weights of variant {variant}{note}")
    chosen: list[str] = []
    for component in sorted(components):
        chosen += _choose_files(component, candidates[component], variant, name, note)
    missing = [file for file in chosen if not (folder / file).is_file()]
    if missing:
        _download(name, folder.name, missing)


def fetch_configs(name: str) -> Path:
    """Download a repository's configs and vocabularies without weights and return their folder. Raises ModelError."""
    return _download(name, None, [INDEX, *(f"*/*{suffix}" for suffix in CONFIG_SUFFIXES)])


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        disable_progress_bars()
    with _hub_errors(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))


def _list_files(name: str, folder: Path) -> tuple[list[PurePosixPath], str]:
    """Return the repository's files at the folder's commit and "" or, if the Hub fails, local files and the reason."""
    import huggingface_hub

    # The list of a commit never changes, and recent versions of the library cache it.
    if get_cached := getattr(huggingface_hub, "get_cached_repo_tree", None):
        with suppress(huggingface_hub.errors.CachedRepoTreeNotFoundError):
            return [PurePosixPath(file.path) for file in get_cached(name, revision=folder.name)], ""
    try:
        with _one_line_for_retries():
            files = huggingface_hub.list_repo_files(name, revision=folder.name)
        return [PurePosixPath(file) for file in files], ""
    except _http_errors() as error:
        local = [PurePosixPath(file.relative_to(folder).as_posix()) for file in folder.glob("*/*") if file.is_file()]
        return local, f" in the local cache, and the Hub does not respond: {first_line(error)}"


def _choose_files(
    component: str, candidates: Sequence[PurePosixPath], variant: str | None, name: str, note: str
) -> Iterator[str]:
    """Yield the paths of the files to load for a component. Raises ModelError if files are missing or only pickled."""
    refuse_pickles(component, candidates, name)
    weights = choose_weights(candidates, variant)
    has_config = any(file.name == "config.json" for file in candidates)
    if not candidates or bool(weights) != has_config:
        missing = "safetensors" if has_config else "config.json" if weights else "files"
        raise ModelError(f"{name}: {component}/ has no {missing}{note}")
    yield from map(str, weights)
    yield from (str(file) for file in candidates if file.suffix in CONFIG_SUFFIXES)


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Re-raise errors of the Hub's library as ModelError."""
    from huggingface_hub import errors

    try:
        with _one_line_for_retries():
            yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name} and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{name} is not on the Hugging Face Hub, or is private ({TOKEN_HINT})") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(f"{name} is not in the local cache, and the Hub does not respond: {_reason(error)}") from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{name} is not a diffusers repository: it has no {INDEX}") from error
    except _http_errors() as error:
        raise ModelError(
            f"{name} could not be fetched from the Hugging Face Hub ({TOKEN_HINT}): {_reason(error)}"
        ) from error


@contextmanager
def _one_line_for_retries() -> Iterator[None]:
    """Log one line for all retries, because the Hub's library logs two lines for each."""
    is_logged = False

    def replace_line(record: logging.LogRecord) -> bool:
        nonlocal is_logged
        reason, is_failure, _ = record.getMessage().partition(" thrown while requesting ")
        if is_failure and not is_logged:
            is_logged = True
            log.warning("the Hugging Face Hub does not respond (%s); retrying", reason.strip("'"))
        return not is_failure and "[Retry " not in reason

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(replace_line)
    try:
        yield
    finally:
        logger.removeFilter(replace_line)


def _http_errors() -> tuple[type[Exception], ...]:
    """Return OSError, ValueError and the errors of the HTTP library that this version of huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, ValueError)


def _reason(error: Exception) -> str:
    """Return the message of the error's cause, if it has one, because the Hub's library itself gives no reason."""
    return first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error).rstrip(".")
