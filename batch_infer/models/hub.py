"""Checkpoints from the Hugging Face Hub: the files of a repository that are loaded, and none beside them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from batch_infer.errors import ModelError, first_line
from batch_infer.models.files import SMALL, is_loaded, refuse_pickles, variant_among

INDEX = "model_index.json"
HIDDEN = "a private or gated model wants HF_TOKEN"


_HTTP_LOGGER = "huggingface_hub.utils._http"

log = logging.getLogger("batch_infer")


def fetch_index(name: str, revision: str | None) -> Path:
    """The folder of the local cache in which a repository's model_index.json lies, fetched where needed.

    The folder bears the name of the commit that the revision stands for. Raises ModelError.
    """
    from huggingface_hub import hf_hub_download

    with _told(name, revision):
        return Path(hf_hub_download(name, INDEX, revision=revision)).parent


def fetch(name: str, folder: Path, components: Collection[str], variant: str | None) -> None:
    """Complete the folder that `fetch_index` gave: the components' settings, words and safetensors.

    A component's weights are those of the variant where it has some, else its plain ones. Raises ModelError before
    anything is fetched where a component is not there, or in pickles alone.
    """
    files, unasked = _list(name, folder)
    if variant and not any(variant_among(_of(component, files), variant) for component in components):
        raise ModelError(f"{name} has no weights of variant {variant}{unasked}")
    chosen = [file for component in sorted(components) for file in _choose(component, files, variant, name, unasked)]
    if missing := [file for file in chosen if not (folder / file).is_file()]:
        _download(name, folder.name, missing)


def fetch_settings(name: str) -> Path:
    """A folder of the local cache with a repository's settings and words, without its weights. Raises ModelError."""
    return _download(name, None, [INDEX, *(f"*/*{suffix}" for suffix in SMALL)])


def _download(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    with _told(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))


def _list(name: str, folder: Path) -> tuple[list[PurePosixPath], str]:
    """The repository's files at the folder's commit; where nobody tells, those here and words that say so."""
    import huggingface_hub

    # A commit's list never changes, and later versions of the library keep it beside the files.
    if recall := getattr(huggingface_hub, "get_cached_repo_tree", None):
        with suppress(huggingface_hub.errors.CachedRepoTreeNotFoundError):
            return [PurePosixPath(file.path) for file in recall(name, revision=folder.name)], ""
    try:
        with _one_line_for_retries():
            files = huggingface_hub.list_repo_files(name, revision=folder.name)
        return [PurePosixPath(file) for file in files], ""
    except _unanswered() as error:
        here = [PurePosixPath(file.relative_to(folder).as_posix()) for file in folder.glob("*/*") if file.is_file()]
        return here, f" in the local cache, and the Hub cannot be asked: {first_line(error)}"


def _of(component: str, files: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    return [file for file in files if file.parent == PurePosixPath(component)]


def _choose(
    component: str, files: Iterable[PurePosixPath], variant: str | None, name: str, unasked: str
) -> Iterator[str]:
    """What is loaded of a component. Raises ModelError where that does not do."""
    own = _of(component, files)
    refuse_pickles(component, own, name)
    weights = [file for file in own if is_loaded(file, variant_among(own, variant))]
    configured = any(file.name == "config.json" for file in own)
    if not own or bool(weights) != configured:
        lacking = "safetensors" if configured else "config.json" if weights else "files"
        raise ModelError(f"{name}: there are no {lacking} of {component}/{unasked}")
    yield from map(str, weights)
    yield from (str(file) for file in own if file.suffix in SMALL)


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """Make one sentence of what the Hub refuses. Raises ModelError."""
    from huggingface_hub import errors

    try:
        with _one_line_for_retries():
            yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name} and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"the Hugging Face Hub has no {name}, or does not show it ({HIDDEN})") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(f"{name} is not in the local cache, and the Hub cannot be asked: {_why(error)}") from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{name} is not a diffusers repository: it has no {INDEX}") from error
    except _unanswered() as error:
        raise ModelError(f"{name} could not be fetched from the Hugging Face Hub ({HIDDEN}): {_why(error)}") from error


class _Retries(logging.Filter):
    """Logs one line for all retries of the Hub's library, which writes two for each."""

    def __init__(self) -> None:
        super().__init__()
        self._is_logged = False

    def filter(self, record: logging.LogRecord) -> bool:
        reason, is_failure, _ = record.getMessage().partition(" thrown while requesting ")
        if is_failure and not self._is_logged:
            self._is_logged = True
            log.warning("the Hugging Face Hub does not answer (%s): trying again", reason.strip("'"))
        return not is_failure and "[Retry " not in reason


@contextmanager
def _one_line_for_retries() -> Iterator[None]:
    logger, retries = logging.getLogger(_HTTP_LOGGER), _Retries()
    logger.addFilter(retries)
    try:
        yield
    finally:
        logger.removeFilter(retries)


def _unanswered() -> tuple[type[Exception], ...]:
    """OSError, all that the HTTP library raises, which is another one in each version of the Hub's, and ValueError."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, ValueError)


def _why(error: Exception) -> str:
    """The error that the Hub's library speaks of, where it only says that there was one."""
    return first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error).rstrip(".")
