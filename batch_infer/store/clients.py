"""Connect to services with fsspec, and describe the errors of its client libraries without secrets."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from batch_infer.errors import BatchInferError, SettingsError, StorageError, UsageError, first_line
from batch_infer.extras import EXTRAS, install_command
from batch_infer.store.urls import HTTP_PROTOCOLS, get_protocol, is_http, redact_urls

PROTOCOL_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "abfss"),
    **dict.fromkeys(("http", "https"), "https"),
}
"""The extra of batch-infer with the package that fsspec needs for each protocol."""
CLIENTS = {
    *("aiobotocore", "aiohttp", "azure", "botocore", "ftplib", "gcsfs", "google", "http", "httpx", "huggingface_hub"),
    *("paramiko", "requests", "smbprotocol", "urllib3"),
}
"""Client packages of services. Their errors, many of which are not OSErrors, also mean that a service failed."""
ACCESS_ERRORS = {
    *("ClientAuthenticationError", "CredentialRetrievalError", "CredentialUnavailableError", "DefaultCredentialsError"),
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "error_perm"),
}
"""Class names of errors without an HTTP status that clients raise if a service refuses access."""
NOT_FOUND, TIMEOUT, CONFLICT, TOO_MANY_REQUESTS = 404, 408, 409, 429
READ_TIMEOUT_SECONDS = 60
"""Timeout for each connection and read. aiohttp's default limits the total time and so aborts large downloads."""
_MISSING_BUCKETS = {"NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist."}
"""Error codes of S3 and Azure, and Google's message, for a bucket or container that does not exist."""


def connect(url: str, name: str, error_class: type[UsageError], verb: str = "reading") -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it. Its listings are not cached.

    `name` is the URL without secrets, for messages. Raises `error_class` if a package is missing, and the errors of
    fsspec.
    """
    import fsspec

    protocol = get_protocol(url) or ""
    extra = PROTOCOL_EXTRAS.get(protocol)
    if extra is not None and find_spec(package := EXTRAS[extra][0]) is None:
        raise error_class(f"{name}: {verb} {protocol}:// needs {package}: {install_command(extra)}")
    if is_http(url):
        from fsspec.implementations import http

        system = http.HTTPFileSystem(**_make_http_options(), use_listings_cache=False, skip_instance_cache=True)
        return system, url
    inner = HTTP_PROTOCOLS.intersection(map(get_protocol, url.split("::")[1:]))
    options: dict[str, Any] = {scheme: _make_http_options() for scheme in inner}
    try:
        try:  # a cached listing could be older than this run
            system, path = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
        except TypeError:  # the file system of this protocol does not accept these options
            system, path = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        message = f"{name}: {verb} {protocol}:// needs another package: {first_line(error)}"
        raise error_class(message) from error
    return system, path


def _make_http_options() -> dict[str, Any]:
    from fsspec.implementations import http

    timeout = http.aiohttp.ClientTimeout(total=None, sock_connect=READ_TIMEOUT_SECONDS, sock_read=READ_TIMEOUT_SECONDS)
    # With compression in transit, the client would also decompress a .csv.gz.
    return {"client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}}


# Errors


class StorageErrors:
    """Translates the errors of fsspec and its clients into StorageError, or SettingsError if a new try would fail too.

    FileNotFoundError passes, unless it means that the bucket is missing, as it does with the verb "write". The original
    error is not chained, because its message may contain a URL with its signature.
    """

    def __init__(self, verb: str, location: str) -> None:
        self._writes = verb == "write"
        self._action = f"cannot {verb} {location}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: Any) -> None:
        error = exc_info[1]
        if not isinstance(error, Exception) or isinstance(error, (BatchInferError, MemoryError)):
            return
        is_missing = isinstance(error, FileNotFoundError)
        if is_bucket_missing(error) or (is_missing and self._writes):
            raise SettingsError(f"{self._action}: its bucket or container does not exist") from None
        if is_missing or not is_service_error(error):
            return
        error_class = SettingsError if is_refusal(error) else StorageError
        raise error_class(f"{self._action}: {describe(error)}") from None


def is_service_error(error: Exception) -> bool:
    """Return whether an error comes from the network or a service, not from content such as an archive."""
    modules = {base.__module__ for base in type(error).__mro__}
    if isinstance(error, EOFError):  # see whether ftplib (the server hung up) or gzip (a file is cut off) raised it
        modules |= {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
    packages = {module.partition(".")[0] for module in modules}
    return isinstance(error, (OSError, asyncio.TimeoutError)) or bool(packages & CLIENTS)


def is_refusal(error: Exception) -> bool:
    """Return whether a service refuses a request because of its content or credentials, so that retries fail too."""
    status = get_http_status(error)
    is_refused = status is not None and 400 <= status < 500 and status not in (TIMEOUT, CONFLICT, TOO_MANY_REQUESTS)
    is_forbidden = isinstance(error, PermissionError) or str(error).startswith("Forbidden: ")  # gcsfs: a bare OSError
    return is_refused or is_forbidden or type(error).__name__ in ACCESS_ERRORS


def is_bucket_missing(error: Exception) -> bool:
    """Return whether a service says that a bucket or container does not exist, and not only an object in it."""
    for cause in _iterate_causes(error):
        code = _get_response(cause).get("Error", {}).get("Code") or getattr(cause, "error_code", None)
        if code in _MISSING_BUCKETS or str(getattr(code, "value", "")) in _MISSING_BUCKETS:
            return True
    return False


def get_http_status(error: Exception) -> int | None:
    """Return the HTTP status of the response that an error is about, or None.

    s3fs raises OSErrors whose cause is botocore's error. Other causes are ignored: aiohttp gives status 400 to the
    error that causes its error about a connection that ends early.
    """
    response = getattr(error, "response", None)
    for owner, name in ((error, "status"), (error, "status_code"), (response, "status_code"), (error, "code")):
        if isinstance(status := getattr(owner, name, None), int):
            return status
    statuses = (
        _get_response(cause).get("ResponseMetadata", {}).get("HTTPStatusCode") for cause in _iterate_causes(error)
    )
    return next((status for status in statuses if isinstance(status, int)), None)


def _iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _get_response(error: BaseException) -> dict[str, Any]:
    """Return the response of a botocore error, or an empty one."""
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def describe(error: Exception) -> str:
    """Return an error's status and message in one line, without URLs that may contain a secret."""
    status, name = get_http_status(error), type(error).__name__
    response = _get_response(error.__cause__ or error)
    message = response.get("Error", {}).get("Message") or getattr(error, "message", "") or ""
    text = redact_urls(first_line(error) if status is None else str(message).partition("\n")[0])
    if "?" in text or "@" in text:
        text = name if status is None else ""
    if status is not None:
        return f"HTTP {status} {text}".strip()
    return f"{name}: {text}" if isinstance(error, (LookupError, AttributeError, AssertionError)) else text
